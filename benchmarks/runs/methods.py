"""The table of docs/methods.md: papers, what of them is here, and what it does on a built-in world beside its control.

    python -m benchmarks.runs.methods         # writes it from the committed results alone; `arm_seeds` makes these

A control differs from the method in one thing, which the column names. Below are cells of `mia_dpo_worlds`: which layer, on which base.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import measure
from benchmarks.runs import mia_dpo_seeds, mia_dpo_worlds
from benchmarks.runs.arm_seeds import MEAN, over_seeds, spread
from benchmarks.runs.mia_dpo_seeds import MAIN, multi
from benchmarks.runs.mia_dpo_worlds import RANDOM
from mmdpo_trainers.methods import METHODS
from mmdpo_trainers.methods.held_out import BASE

PAGE, SECTION = "docs/methods.md", "methods"
COLUMNS = ["source", "here", "configuration", "figure", BASE, "as it is", "control", "seeds"]
NOT_MEASURED = "not measured"


class Row(NamedTuple):
    """A method on a built-in world."""

    source: str | None
    """arXiv number; None: no paper's."""
    here: str
    method: str
    """Whose main arm is "as it is", unless `arm` says another."""
    config: str
    result: str
    """Name of the result file."""
    figures: tuple[str, ...]
    control: str
    """An arm of the configuration."""
    arm: str | None = None


_PRIOR = ("accuracy/answer/disagree", "accuracy/caption/disagree")

ROWS = (
    Row("2410.17637", "MIA-DPO", "mia_dpo", "shapes_mia_dpo", "mia_dpo_seeds", (MEAN, "single"), "random_wrong"),
    Row("2406.11839", "mDPO", "mdpo", "shapes_mdpo", "mdpo_seeds", (*_PRIOR, "gap/caption/crop"), "dpo"),
    Row(
        "2402.10884",
        "rated answers, DPO on them",
        "rated",
        "shapes_rated",
        "shapes_rated_seeds",
        (MEAN, "single"),
        "random_pairs",
    ),
    Row("2402.10884", "SFT on the best answer", "rated", "shapes_rated", "shapes_rated_seeds", (MEAN,), "random_pairs", "best"),
    Row("2310.05344", "SteerLM", "rated", "shapes_rated", "shapes_rated_seeds", (MEAN,), "random_pairs", "steerlm"),
    Row(
        "2309.14525",
        "reward model with facts",
        "reward",
        "shapes_reward",
        "shapes_reward_seeds",
        ("ranked right/all",),
        "no_facts",
    ),
    Row("2407.02477", "BDHS", "bdhs", "shapes_bdhs", "shapes_bdhs_seeds", _PRIOR, "nothing_hidden"),
    Row("2402.04792", "online DPO", "online_dpo", "shapes_online", "shapes_online_seeds", _PRIOR, "dpo"),
    Row("2407.02477", "mixed DPO", "online_dpo", "shapes_online", "shapes_online_seeds", _PRIOR, "dpo", "mixed_dpo"),
    Row(
        None,
        "attention as an objective",
        "mia_dpo",
        "shapes_attention_target",
        "shapes_attention_target_seeds",
        (MEAN, "single"),
        "mia_dpo",
        "log_share_tenth",
    ),
    Row(
        None,
        "two kinds of corrupted views",
        "mdpo",
        "shapes_views",
        "shapes_views_seeds",
        (*_PRIOR, "gap/caption/crop"),
        "mdpo",
        "crop_and_noise",
    ),
    Row("2411.10442", "MPO", "mpo", "shapes_mpo", "shapes_mpo_seeds", (*_PRIOR, "gap/caption/crop"), "dpo"),
    Row("2506.11712", "SymMPO", "sym_mpo", "shapes_sym_mpo", "shapes_sym_mpo_seeds", (*_PRIOR, "gap/caption/crop"), "dpo"),
)


class CellRow(NamedTuple):
    """MIA-DPO's selection in cells of `mia_dpo_worlds`: the multi-image mean of an arm beside another's, or another layer's."""

    here: str
    config: str
    cell: str
    """Name of a cell, as `mia_dpo_worlds.key_of` gives it."""
    control_cell: str
    control: str
    """An arm's name there."""
    name: str
    """What the control is called."""


CELL_ROWS = (
    CellRow("selection by the best layer", "shapes_mia_dpo", "shapes/0/best", "shapes/0/2", MAIN, "middle layer"),
    CellRow("the same, 30 % wrong answers", "shapes_mia_dpo", "shapes/0.3/best", "shapes/0.3/2", MAIN, "middle layer"),
    CellRow(
        "attention that tells", "shapes_looking_mia_dpo", "shapes_looking/0/best", "shapes_looking/0/best", RANDOM, "random wrong"
    ),
    CellRow(
        "the same, 30 % wrong answers",
        "shapes_looking_mia_dpo",
        "shapes_looking/0.3/best",
        "shapes_looking/0.3/best",
        RANDOM,
        "random wrong",
    ),
)


def write() -> Path:
    """The section of docs/methods.md, from the committed results alone. Returns the page."""
    measure.write_section(PAGE, SECTION, text())
    return measure.ROOT / PAGE


def text() -> str:
    """Markdown: a line for each figure of each row."""
    lines = [line for row in ROWS for line in _lines(row)]
    lines += [_cell_line(row) for row in CELL_ROWS]
    return measure.markdown(COLUMNS, lines)


def _lines(row: Row) -> list[list[str]]:
    method, path = METHODS[row.method], measure.RESULTS / f"{row.result}.json"
    source, config = f"arXiv {row.source}" if row.source else "", f"`{row.config}.yaml`"
    control = method.name_of(row.control)
    if not path.is_file():
        return [[source, row.here, config, NOT_MEASURED, "", "", control, ""]]
    summaries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["summaries"]
    found, main = over_seeds(summaries), method.name_of(row.arm or method.name)
    lines = []
    for number, name in enumerate(row.figures):
        before, as_it_is, beside = (spread(found[arm].get(name, [])) for arm in (BASE, main, control))
        label = name.removeprefix("accuracy/").replace("/", ", ")
        first = [source, row.here, config] if number == 0 else ["", "", ""]
        lines.append([*first, label, before, as_it_is, f"{beside}, {control}", str(len(summaries))])
    return lines


def _cell_line(row: CellRow) -> list[str]:
    cells, first = mia_dpo_worlds.measured(measure.RESULTS), ["arXiv 2410.17637", row.here, f"`{row.config}.yaml`"]
    seeds = [seed for seed in cells.get(row.cell, {}) if seed in cells.get(row.control_cell, {})]
    if not seeds:
        return [*first, NOT_MEASURED, "", "", row.name, ""]
    found = [mia_dpo_seeds.accuracies(cells[row.cell][seed]) for seed in seeds]
    beside = [mia_dpo_seeds.accuracies(cells[row.control_cell][seed]) for seed in seeds]
    before, as_it_is = (spread([multi(each[arm]) for each in found]) for arm in (mia_dpo_seeds.BASE, MAIN))
    control = spread([multi(each[row.control]) for each in beside])
    return [*first, MEAN, before, as_it_is, f"{control}, {row.name}", str(len(seeds))]


if __name__ == "__main__":
    print(write())
