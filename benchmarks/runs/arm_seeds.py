"""A configuration and its arms over several seeds: tables of docs/results.md, and the overview of docs/methods.md.

    python -m benchmarks.runs.arm_seeds shapes_rated      # runs what is missing, then writes table and result file
    python -m benchmarks.runs.arm_seeds shapes_online --seeds 0

Each seed is a run of the configuration in `runs/<name>_seed<k>`, on the one shipped base: its own source pictures, evaluation questions,
draws and training seed. The result is `results/<name>_seeds.json`. A killed seed continues where it stopped. The tables state what was
found; nothing in them is a goal.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, add_place, markdown, place_of, run_mmdpo, settings_of
from benchmarks.runs import mdpo_seeds, mia_dpo_seeds
from benchmarks.runs.mia_dpo_seeds import MULTI, multi
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.methods import method_named
from mmdpo_trainers.methods.held_out import BASE, flat_figures

MEAN = "multi-image mean"
SMALL = {"augmented": mia_dpo_seeds.SMALL, "pairs": mdpo_seeds.SMALL}
"""What a method is evaluated on -> settings of a run that shows no more than that it runs."""

Summaries = Mapping[Any, Mapping[str, Any]]


def run_seed(config: str, seed: int, folder: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Run one seed, or continue it, and return its summary. changes: of the configuration's settings."""
    run_mmdpo("run", config, "--seed", str(seed), "--run-dir", str(folder), *settings_of(changes))
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def figures(summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Arm, by the name that readers know -> figure -> value; no training first, then the main arm."""
    # A summary of a time when there was one method says none.
    method = method_named(summary.get("method", RunConfig().method))
    if "accuracy" in summary:
        found = {BASE: summary["accuracy"]["before"], method.title: summary["accuracy"]["after"]}
        found |= {method.name_of(arm): each["accuracy"]["after"] for arm, each in summary["arms"].items()}
        return {arm: _by_format(accuracy) for arm, accuracy in found.items()}
    return {BASE: _flat(summary["before"]), **{method.name_of(arm): _flat(each) for arm, each in summary["arms"].items()}}


def _by_format(accuracy: Mapping[str, float]) -> dict[str, float]:
    means = {MEAN: multi(dict(accuracy))} if set(MULTI) <= set(accuracy) else {}
    known = {name: value for name, value in accuracy.items() if value is not None}
    return {**{name: known.pop(name) for name in MULTI if name in known}, **means, **known}


def _flat(found: Mapping[str, Any]) -> dict[str, float]:
    rewards = found.get("rewards")
    if rewards:
        return {f"ranked right/{group}": float(each["accuracy"]) for group, each in rewards.items()}
    return flat_figures(found)


def over_seeds(summaries: Summaries) -> dict[str, dict[str, list[float]]]:
    """Arm -> figure -> its value in each seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for summary in summaries.values():
        for arm, each in figures(summary).items():
            for name, value in each.items():
                found.setdefault(arm, {}).setdefault(name, []).append(value)
    return found


def spread(values: Sequence[float]) -> str:
    """The mean, and of several values the smallest and largest in brackets; a dash where there is none."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def table(summaries: Summaries) -> str:
    """Markdown: each arm's mean over seeds, smallest to largest in brackets, and how long the runs took."""
    found = over_seeds(summaries)
    every = dict.fromkeys(name for values in found.values() for name in values)
    # Rewards and the other gaps stand in the result file.
    names = [name for name in every if not name.startswith("reward/") and (not name.startswith("gap/") or name.endswith("/crop"))]
    rows = [[arm, *(spread(values.get(name, [])) for name in names)] for arm, values in found.items()]
    seconds = ", ".join(f"{summary['seconds']['total']:,.0f}" for summary in summaries.values())
    note = f"Seeds {', '.join(map(str, summaries))}: mean, smallest to largest in brackets. Seconds of the runs: {seconds}."
    header = [name.removeprefix("accuracy/").replace("/", ", ") for name in names]
    return "\n".join([markdown(["arm", *header], rows), "", note])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a configuration on a built-in world: the name of a shipped one, or a file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run (default 0 1 2)")
    add_place(parser)
    arguments = parser.parse_args(argv)
    place, config = place_of(arguments), RunConfig.from_yaml(arguments.config)
    runs = ROOT / "runs" if place.committed else place.folder / "runs"
    changes = SMALL[method_named(config.method).evaluation_prompts] if arguments.small else {}
    folders = {seed: runs / f"{config.name}_seed{seed}" for seed in arguments.seeds}
    summaries = {seed: run_seed(arguments.config, seed, folder, changes) for seed, folder in folders.items()}
    text = table(summaries)
    print(text)
    kept = {seed: mdpo_seeds.without_curves(summary) for seed, summary in summaries.items()}
    place.result(f"{config.name}_seeds", {"summaries": kept})
    place.section("docs/results.md", f"{config.name}_seeds", text)
    if place.committed:
        from benchmarks.runs import methods  # which reads this module

        methods.write()


if __name__ == "__main__":
    main()
