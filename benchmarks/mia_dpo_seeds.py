"""MIA-DPO on the embedded default over several seeds, with control arms: the table of docs/results.md.

    python -m benchmarks.mia_dpo_seeds              # runs what is missing, then writes the table and results/mia_dpo_seeds.json

Each seed is the demo's configuration with three arms more, in `runs/mia_dpo_seed<k>`: its own source pictures, evaluation questions and
training seed, on the one shipped base. A killed seed continues where it stopped. The table states what was found; goals are
checked and printed as met or missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import write_result

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "shapes_mia_dpo.yaml"
PAGE = ROOT / "docs" / "results.md"
MULTI = ("sequence", "grid", "pip")
GAIN, LOSS = 0.10, 0.02
START, END = "<!-- mia_dpo_seeds: begin -->", "<!-- mia_dpo_seeds: end -->"
MAIN = "attention-selected (MIA-DPO)"
ARMS = {
    "random_wrong": ("random wrong answers as rejected", {"select": {"rule": "random_wrong"}}),
    "perplexity": ("perplexity only, same format mix", {"select": {"rule": "perplexity"}}),
    "sft": ("SFT on the same chosen answers", {"train": {"args": {"loss_type": ["nll"], "loss_weights": [1.0]}}}),
}


def accuracies(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Arm -> accuracy by format, "no training" first."""
    found = {"no training": summary["accuracy"]["before"], MAIN: summary["accuracy"]["after"]}
    found.update({title: summary["arms"][name]["accuracy"]["after"] for name, (title, _) in ARMS.items()})
    return found


def multi(accuracy: dict[str, float]) -> float:
    """Mean over the multi-image formats."""
    return statistics.fmean(accuracy[name] for name in MULTI)


def run_seed(seed: int) -> dict[str, Any]:
    """Run one seed, or continue it, and return its summary."""
    folder = ROOT / "runs" / f"mia_dpo_seed{seed}"
    arms = json.dumps({name: overrides for name, (_, overrides) in ARMS.items()})
    command = [sys.executable, "-m", "mmdpo_trainers.cli", "run", str(CONFIG)]
    command += ["--seed", str(seed), "--run-dir", str(folder), "--set", f"arms={arms}"]
    subprocess.run(command, check=True, cwd=ROOT)
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def table(summaries: dict[int, dict[str, Any]]) -> str:
    """Markdown: one row an arm and seed, and what the goals say."""
    lines = ["| seed | arm | sequence | grid | pip | multi-image mean | single |", "|---|---|---|---|---|---|---|"]
    verdicts = []
    for seed, summary in summaries.items():
        found = accuracies(summary)
        for arm, accuracy in found.items():
            cells = [f"{accuracy[name]:.3f}" for name in MULTI] + [f"{multi(accuracy):.3f}", f"{accuracy['single']:.3f}"]
            lines.append(f"| {seed} | {arm} | " + " | ".join(cells) + " |")
        gain = multi(found[MAIN]) - multi(found["no training"])
        change = found[MAIN]["single"] - found["no training"]["single"]
        met = "met" if round(gain, 6) >= GAIN and round(abs(change), 6) <= LOSS else "missed"
        pairs = ", ".join(f"{count} {name}" for name, count in summary["pairs"].items())
        verdicts.append(
            f"- seed {seed}: multi-image {100 * gain:+.1f} points, single-image {100 * change:+.1f}: goal {met}; {pairs} pairs"
        )
    goal = f"Goal: multi-image at least +{100 * GAIN:.0f} points, single-image within {100 * LOSS:.0f}, in every seed."
    return "\n".join([*lines, "", goal, "", *verdicts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run (default 0 1 2)")
    arguments = parser.parse_args()
    summaries = {seed: run_seed(seed) for seed in arguments.seeds}
    text = table(summaries)
    print(text)
    write_result("mia_dpo_seeds", {"summaries": summaries})
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    PAGE.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
