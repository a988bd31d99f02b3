"""MIA-DPO's criterion where attention tells right answers from wrong ones and where it does so less, on clean and on partly wrong data.

    python -m benchmarks.runs.mia_dpo_worlds             # runs what is missing, then writes the table and results/mia_dpo_worlds.json
    python -m benchmarks.runs.mia_dpo_worlds --world shapes_looking --wrong-answers 0 --layer 2 --seeds 0 --output FOLDER

A cell is a base (its configuration), a share of wrong source answers (`data.wrong_answers`) and a layer (`score.layer`), each over
several seeds, each seed with MIA-DPO and its control arms in a run folder of its own. A killed run continues where it stopped, and the
result file is written after each. Part of the cells adds to the file's others. The table states what was found; nothing in it is a goal.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import ROOT, add_place, markdown, place_of, run_mmdpo, settings_of
from benchmarks.runs.mia_dpo_seeds import ARMS, BASE, MAIN, MULTI, SMALL, accuracies, multi
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.values import parse_yaml
from mmdpo_trainers.data import roc
from mmdpo_trainers.data.match import is_right
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.methods.selection import match_of

CONFIGS = {
    "shapes": "shapes_mia_dpo",
    "shapes_looking": "shapes_looking_mia_dpo",
}
NAME = "mia_dpo_worlds"
RANDOM = ARMS["random_wrong"][0]


def run_cell(world: str, wrong: float, layer: Any, seed: int, runs: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Run one seed of a cell, or continue it. Returns its summary with `auc`, see `ratio_auc`. changes: of the configuration's settings."""
    folder = runs / f"{NAME}_{world}_wrong{wrong:g}_layer{layer}_seed{seed}"
    settings = {**changes, "arms": {name: overrides for name, (_, overrides) in ARMS.items()}}
    settings["data"] = {**changes.get("data", {}), "wrong_answers": wrong}
    settings["score"] = {"layer": layer}
    run_mmdpo("run", CONFIGS[world], "--seed", str(seed), "--run-dir", str(folder), *settings_of(settings))
    return {**json.loads((folder / "summary.json").read_text(encoding="utf-8")), "auc": ratio_auc(folder)}


def ratio_auc(folder: Path) -> dict[str, float | None]:
    """Format -> area under the ROC curve of the ratio that selection used as a test of right answers; None without right or wrong ones.

    Right is what is true of the picture, also where the data says otherwise.
    """
    data = json.loads((folder / "augment" / "source" / "data.json").read_text(encoding="utf-8"))
    truths = {record["id"]: record["truth"] for record in data if "truth" in record}
    match = match_of(RunConfig.from_yaml(folder / "config.yaml").select)
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in MULTI}
    for record in read_jsonl(folder / "score" / "scores.jsonl"):
        if record["format"] in found and record["ratio"] is not None:
            truth = truths.get(record["source_id"], record["answer"])
            right = is_right(record["response"], truth, options=record["options"], match=match)
            found[record["format"]][right is True].append(record["ratio"])
    areas = {name: roc.area([np.asarray(right)], [np.asarray(wrong)]) for name, (wrong, right) in found.items()}
    return {name: None if each is None else each.value for name, each in areas.items()}


def table(cells: Mapping[str, Mapping[str, dict[str, Any]]]) -> str:
    """Markdown. cells: name of a cell (`key_of`) -> seed -> summary; without any it says so."""
    if not cells:
        return "Nothing is measured yet."
    rows, notes = [], []
    for key, summaries in sorted(cells.items()):
        world, wrong, layer = key.split("/")
        found = [accuracies(summary) for summary in summaries.values()]
        for arm in found[0]:
            means = [statistics.fmean(each[arm][name] for each in found) for name in (*MULTI, "single")]
            multis = [multi(each[arm]) for each in found]
            spread = f"{statistics.fmean(multis):.3f} ({min(multis):.3f} to {max(multis):.3f})"
            rows.append([world, wrong, layer, arm, *(f"{mean:.3f}" for mean in means[:-1]), spread, f"{means[-1]:.3f}"])
        areas = ", ".join(f"{name} {_areas(summary['auc'][name] for summary in summaries.values())}" for name in MULTI)
        ahead = ", ".join(f"{100 * (multi(each[MAIN]) - multi(each[RANDOM])):+.1f}" for each in found)
        gained = ", ".join(f"{100 * (multi(each[MAIN]) - multi(each[BASE])):+.1f}" for each in found)
        pairs = ", ".join(str(sum(summary["pairs"].values())) for summary in summaries.values())
        seeds = ", ".join(summaries)
        notes.append(
            f"- {world}, {wrong} of the answers wrong, layer {layer}, seeds {seeds}: AUC of the ratio {areas}; {pairs} pairs; "
            f"attention-selected {ahead} points from random wrong, {gained} from no training"
        )
    columns = ["base", "wrong answers", "layer", "arm", *MULTI, "multi-image mean (smallest to largest)", "single"]
    return "\n".join([markdown(columns, rows), "", *notes])


def key_of(world: str, wrong: float, layer: Any) -> str:
    """Name of a cell."""
    return f"{world}/{wrong:g}/{layer}"


def _areas(found: Iterable[float | None]) -> str:
    known = [area for area in found if area is not None]
    return f"{statistics.fmean(known):.2f}" if known else "-"


def measured(folder: Path) -> dict[str, dict[str, Any]]:
    """The cells of a folder's result file; none without one."""
    path = folder / f"{NAME}.json"
    return json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else {}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="bases (default: both)")
    parser.add_argument(
        "--wrong-answers", type=float, nargs="+", default=[0.0, 0.3], help="shares of wrong source answers (default 0 0.3)"
    )
    parser.add_argument("--layer", type=parse_yaml, nargs="+", default=[2], help="values of score.layer (default 2)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run (default 0 1 2)")
    add_place(parser)
    arguments = parser.parse_args(argv)
    place, changes = place_of(arguments), SMALL if arguments.small else {}
    runs = ROOT / "runs" if place.committed else place.folder / "runs"
    for seed, *cell in itertools.product(arguments.seeds, arguments.world, arguments.wrong_answers, arguments.layer):
        summary = run_cell(*cell, seed, runs, changes)
        cells = measured(place.folder)  # not before: another process may have written its cells meanwhile
        cells.setdefault(key_of(*cell), {})[str(seed)] = summary
        place.result(NAME, {"cells": cells})
    text = table(measured(place.folder))
    print(text)
    place.section("docs/results.md", NAME, text)


if __name__ == "__main__":
    main()
