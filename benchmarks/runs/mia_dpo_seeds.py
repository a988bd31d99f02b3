"""MIA-DPO on the embedded default over several seeds, with control arms: the table of docs/results.md.

    python -m benchmarks.runs.mia_dpo_seeds              # runs what is missing, then writes the tables and results/mia_dpo_seeds.json

Each seed is the demo's configuration with three arms more, in `runs/mia_dpo_seed<k>`: its own source pictures, evaluation questions and
training seed, on the one shipped base. A killed seed continues where it stopped. The table states what was found; goals are
checked and printed as met or missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, add_place, markdown, place_of, run_mmdpo, settings_of

CONFIG = "shapes_mia_dpo"
MULTI = ("sequence", "grid", "pip")
GAIN, LOSS = 0.10, 0.02
BASE, MAIN = "no training", "attention-selected (MIA-DPO)"
ARMS = {
    "random_wrong": ("random wrong answers as rejected", {"select": {"rule": "random_wrong"}}),
    "perplexity": ("perplexity only, same format mix", {"select": {"rule": "perplexity"}}),
    "sft": ("SFT on the same chosen answers", {"train": {"args": {"loss_type": ["nll"], "loss_weights": [1.0]}}}),
}


SMALL = {
    "data": {"pictures": 60},
    "augment": {"num_prompts": 120},
    "train": {"args": {"num_train_epochs": 1, "lora_r": 4, "lora_alpha": 8}},
    "evaluate": {"per_format": {"sequence": 4, "grid": 4, "pip": 4, "single": 4}},
    "report": {"heat_maps": 0},
}
"""Settings of a run that shows no more than that it runs."""


def accuracies(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Arm -> accuracy by format, "no training" first."""
    found = {BASE: summary["accuracy"]["before"], MAIN: summary["accuracy"]["after"]}
    found.update({title: summary["arms"][name]["accuracy"]["after"] for name, (title, _) in ARMS.items()})
    return found


def multi(accuracy: dict[str, float]) -> float:
    """Mean over the multi-image formats."""
    return statistics.fmean(accuracy[name] for name in MULTI)


def run_seed(seed: int, folder: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Run one seed, or continue it, and return its summary. changes: of the configuration's settings."""
    arms = {name: overrides for name, (_, overrides) in ARMS.items()}
    run_mmdpo("run", CONFIG, "--seed", str(seed), "--run-dir", str(folder), *settings_of({**changes, "arms": arms}))
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def table(summaries: dict[Any, dict[str, Any]]) -> str:
    """Markdown: each arm's mean over seeds, one row an arm and seed, and what the goals say."""
    rows, verdicts = [], []
    arms: dict[str, list[list[float]]] = {}
    for seed, summary in summaries.items():
        found = accuracies(summary)
        for arm, accuracy in found.items():
            cells = [*(accuracy[name] for name in MULTI), multi(accuracy), accuracy["single"]]
            rows.append([str(seed), arm, *(f"{cell:.3f}" for cell in cells)])
            arms.setdefault(arm, []).append(cells)
        gain = multi(found[MAIN]) - multi(found[BASE])
        change = found[MAIN]["single"] - found[BASE]["single"]
        met = "met" if round(gain, 6) >= GAIN and round(abs(change), 6) <= LOSS else "missed"
        pairs = ", ".join(f"{count} {name}" for name, count in summary["pairs"].items())
        changes = f"multi-image {100 * gain:+.1f} points, single-image {100 * change:+.1f}"
        verdicts.append(f"- seed {seed}: {changes}: goal {met}; {pairs} pairs")
    means = [
        ["mean", arm, *(f"{statistics.fmean(each):.3f}" for each in zip(*cells, strict=True))] for arm, cells in arms.items()
    ]
    goal = f"Goal: multi-image at least +{100 * GAIN:.0f} points, single-image within {100 * LOSS:.0f}, in every seed."
    columns = ["seed", "arm", *MULTI, "multi-image mean", "single"]
    return "\n".join([markdown(columns, [*means, *rows]), "", goal, "", *verdicts])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run (default 0 1 2)")
    add_place(parser)
    arguments = parser.parse_args(argv)
    place = place_of(arguments)
    runs = ROOT / "runs" if place.committed else place.folder / "runs"
    changes = SMALL if arguments.small else {}
    summaries = {seed: run_seed(seed, runs / f"mia_dpo_seed{seed}", changes) for seed in arguments.seeds}
    text = table(summaries)
    print(text)
    place.result("mia_dpo_seeds", {"summaries": summaries})
    place.section("docs/results.md", "mia_dpo_seeds", text)
    if place.committed:
        from benchmarks import readme  # which reads this module

        readme.write()


if __name__ == "__main__":
    main()
