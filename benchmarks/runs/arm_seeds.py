"""A configuration and its arms over several seeds, accuracy by format: tables of docs/results.md.

    python -m benchmarks.runs.arm_seeds configs/shapes_rated.yaml     # runs what is missing, then writes table and result file

Each seed is a run of the configuration in `runs/<name>_seed<k>`, on the one shipped base: its own source pictures, evaluation questions,
draws and training seed. The result is `results/<name>_seeds.json`. A killed seed continues where it stopped. The table states what was
found; nothing in it is a goal.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, add_place, markdown, place_of, run_mmdpo, settings_of
from benchmarks.runs.mia_dpo_seeds import BASE, MULTI, SMALL, multi
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.methods import method_named

COLUMNS = (*MULTI, "multi-image mean", "single")


def run_seed(config: Path, seed: int, folder: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Run one seed, or continue it, and return its summary. changes: of the configuration's settings."""
    run_mmdpo("run", str(config), "--seed", str(seed), "--run-dir", str(folder), *settings_of(changes))
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def accuracies(summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Arm, by the name that readers know -> accuracy by format; no training first, then the main arm."""
    method = method_named(summary["method"])
    found = {BASE: summary["accuracy"]["before"], method.title: summary["accuracy"]["after"]}
    return found | {method.name_of(arm): each["accuracy"]["after"] for arm, each in summary["arms"].items()}


def table(summaries: Mapping[Any, Mapping[str, Any]]) -> str:
    """Markdown: each arm's mean over seeds, smallest to largest in brackets, and its gain of multi-image accuracy seed by seed."""
    by_seed = [accuracies(summary) for summary in summaries.values()]
    rows = []
    for arm in by_seed[0]:
        cells = [[found[arm].get(name) if name != COLUMNS[-2] else multi(found[arm]) for name in COLUMNS] for found in by_seed]
        gains = ", ".join(f"{100 * (multi(found[arm]) - multi(found[BASE])):+.1f}" for found in by_seed)
        rows.append([arm, *map(_spread, zip(*cells, strict=True)), gains])
    pairs = "; ".join(
        f"seed {seed}: {sum(summary['pairs'].values()):,}, {summary['seconds']['total']:,.0f} s"
        for seed, summary in summaries.items()
    )
    seeds = ", ".join(map(str, summaries))
    note = f"Mean over seeds {seeds}, smallest to largest in brackets. Records of the main arm, and a run's time: {pairs}."
    return "\n".join([markdown(["arm", *COLUMNS, "points over no training, by seed"], rows), "", note])


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):.3f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.3f} to {max(known):.3f})"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a configuration on a built-in world, evaluated by format")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run (default 0 1 2)")
    add_place(parser)
    arguments = parser.parse_args(argv)
    place, name = place_of(arguments), RunConfig.from_yaml(arguments.config).name
    runs = ROOT / "runs" if place.committed else place.folder / "runs"
    changes = SMALL if arguments.small else {}
    summaries = {seed: run_seed(arguments.config, seed, runs / f"{name}_seed{seed}", changes) for seed in arguments.seeds}
    text = table(summaries)
    print(text)
    place.result(f"{name}_seeds", {"summaries": summaries})
    place.section("docs/results.md", f"{name}_seeds", text)


if __name__ == "__main__":
    main()
