"""mDPO and its arms on the embedded default over several seeds: the tables of docs/results.md.

    python -m benchmarks.runs.mdpo_seeds                 # runs what is missing, then writes the tables and results/mdpo_seeds.json

Each seed is `shapes_mdpo` with its own pairs, held-out pairs, evaluation questions and training seed, on the one shipped
base. The first seed's run is `runs/shapes_mdpo`, whose page then shows the others beside it; they are `runs/mdpo_seed<k>`. A killed seed
continues where it stopped. The tables state what was found; goals are checked and printed as met or missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, add_place, markdown, place_of, run_mmdpo, settings_of
from mmdpo_trainers.methods import METHODS
from mmdpo_trainers.methods.held_out import BASE, CORRUPTIONS, over_seeds

CONFIG = "shapes_mdpo"
METHOD = METHODS["mdpo"]
RATIO = 1.5
KINDS = ("answer", "caption")
GROUPS = tuple(f"accuracy/{kind}/{when}" for kind in KINDS for when in ("disagree", "agree"))
GAPS = tuple(f"gap/{kind}/{name}" for kind in (*KINDS, "all") for name in CORRUPTIONS)
REWARDS = tuple(f"reward/{kind}/{side}" for kind in KINDS for side in ("chosen", "rejected"))

SMALL = {
    "pairs": {"pictures": 16, "held_out": 0.5, "questions": {"disagree": 2, "agree": 2}},
    "train": {"args": {"num_train_epochs": 1, "per_device_train_batch_size": 8, "lora_r": 4, "lora_alpha": 8}},
    "evaluate": {"max_new_tokens": 4},
}
"""Settings of a run that shows no more than that it runs."""

Values = Mapping[str, Mapping[str, list[float]]]


def folder_of(seed: int, first: int, runs: Path) -> Path:
    """Where a seed's run is."""
    return runs / ("shapes_mdpo" if seed == first else f"mdpo_seed{seed}")


def run_seed(seed: int, folder: Path, changes: Mapping[str, Any], others: Sequence[Path] = ()) -> dict[str, Any]:
    """Run one seed, or continue it, and return its summary. changes: of the configuration's settings; others: runs that its page
    shows beside it."""
    seeds = {"report": {"seeds": [str(path) for path in others]}}
    run_mmdpo("run", CONFIG, "--seed", str(seed), "--run-dir", str(folder), *settings_of({**changes, **seeds}))
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def mean_and_range(values: Sequence[float]) -> str:
    """Mean, with the smallest and largest in brackets."""
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "-"


def table(values: Values, names: Sequence[str]) -> str:
    """Markdown: one row an arm."""
    rows = [[METHOD.name_of(arm), *(mean_and_range(found.get(name, [])) for name in names)] for arm, found in values.items()]
    header = [name.partition("/")[2].replace("/", ", ") for name in names]
    return markdown(["arm", *header], [row for row in rows if set(row[1:]) != {"-"}])


def verdicts(values: Values) -> list[str]:
    """What the goals say, one line each, seed by seed."""
    lines = []
    for name in GAPS:
        if name in values.get(METHOD.name, {}) and name in values.get("dpo", {}):
            ratios = [a / b for a, b in zip(values[METHOD.name][name], values["dpo"][name], strict=True)]
            lines.append(
                _line(f"{name[4:].replace('/', ', ')}: gap of mDPO over DPO's", ratios, min(ratios) >= RATIO, f">= {RATIO}")
            )
    for arm, wanted in (("dpo", "below 0"), (METHOD.name, "0 or above"), ("mdpo_without_ancpo", "below 0")):
        rewards = values.get(arm, {}).get("reward/caption/chosen", [])
        if rewards:
            met = min(rewards) >= 0 if wanted == "0 or above" else max(rewards) < 0
            lines.append(_line(f"chosen reward of held-out captions, {METHOD.name_of(arm)}", rewards, met, wanted))
    return lines


def _line(what: str, found: Sequence[float], met: bool, wanted: str) -> str:
    return f"- {what}: {', '.join(f'{value:.2f}' for value in found)} ({wanted} in every seed: {'met' if met else 'missed'})"


def text_of(summaries: Mapping[int, Mapping[str, Any]]) -> str:
    """The section of docs/results.md."""
    values = over_seeds(summaries.values())
    parts = [
        f"Mean over seeds {', '.join(map(str, summaries))}, smallest to largest in brackets. Accuracy:",
        table(values, GROUPS),
    ]
    parts += ["Gap, log p(chosen | picture) - log p(chosen | corrupted picture) in nats, on held-out pairs:", table(values, GAPS)]
    trained = {arm: found for arm, found in values.items() if arm != BASE}
    parts += ["Rewards on held-out pairs:", table(trained, REWARDS), "Goals, seed by seed:", "\n".join(verdicts(values))]
    return "\n\n".join(parts)


def without_curves(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary without its long part, which is in the runs' own."""
    arms = {arm: {name: value for name, value in figures.items() if name != "curves"} for arm, figures in summary["arms"].items()}
    return {**summary, "arms": arms}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run (default 0 1 2)")
    add_place(parser)
    arguments = parser.parse_args(argv)
    seeds, place, changes = arguments.seeds, place_of(arguments), SMALL if arguments.small else {}
    runs = ROOT / "runs" if place.committed else place.folder / "runs"
    folders = {seed: folder_of(seed, seeds[0], runs) for seed in seeds}
    found = {seed: run_seed(seed, folders[seed], changes) for seed in seeds[1:]}
    found[seeds[0]] = run_seed(seeds[0], folders[seeds[0]], changes, [folders[seed] for seed in seeds[1:]])
    summaries = {seed: found[seed] for seed in seeds}
    text = text_of(summaries)
    print(text)
    place.result("mdpo_seeds", {"summaries": {seed: without_curves(summary) for seed, summary in summaries.items()}})
    place.section("docs/results.md", "mdpo_seeds", text)


if __name__ == "__main__":
    main()
