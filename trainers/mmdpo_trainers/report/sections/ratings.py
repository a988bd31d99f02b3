"""How answers were rated, what was made of them, and pairs with their ratings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..comparison import PageInputs
from ..contents import Record, RunContents, by_format, label_of, spread
from ..examples import Cell, image_cells, question_of, text_of
from ..numbers import NONE, number
from ..tables import Group, Table, reason_words

_MOST_VALUES = 12
"""Columns that a table of ratings may have: more different whole numbers than that are shown by their mean alone."""


@dataclass(frozen=True, kw_only=True)
class RatedPair:
    """One pair as shown, with the ratings of both answers in words."""

    question: str
    chosen: str
    rejected: str
    chosen_ratings: str
    rejected_ratings: str
    cells: list[Cell]
    columns: int
    width: str


def ratings(page: PageInputs) -> dict[str, Any]:
    """Ratings by attribute, what each arm trains on, and example pairs."""
    contents = page.run
    return {
        "distribution": _distribution(contents.ratings),
        "distinct": _distinct(contents),
        "arms": _arms_table(page),
        "groups": _groups(contents, page.pairs),
    }


def _distribution(records: Sequence[Record]) -> Table | None:
    """How often each attribute got each value, rounded to whole numbers, and its mean; None where there is no rating."""
    found: dict[str, list[float]] = {}
    for rating in (each for record in records for each in record["ratings"] if each is not None):
        for name, value in rating.items():
            found.setdefault(name, []).append(float(value))
    if not found:
        return None
    counts = {name: Counter(round(value) for value in values) for name, values in found.items()}
    shown = sorted({value for count in counts.values() for value in count})
    shown = shown if len(shown) <= _MOST_VALUES else []
    answers = sum(len(record["responses"]) for record in records)
    without = sum(each is None for record in records for each in record["ratings"])
    rows = [
        [name, number(sum(values) / len(values), ".2f"), *(f"{counts[name][value]:,}" for value in shown)]
        for name, values in found.items()
    ]
    return Table(
        caption=f"Ratings of {answers:,} answers to {len(records):,} prompts, {without:,} of them without; values rounded to whole numbers.",
        head=["Attribute", "Mean", *(number(value, "d") for value in shown)],
        rows=rows,
    )


def _distinct(contents: RunContents) -> str:
    """How different the answers to a prompt were; empty where that was not counted."""
    summary = contents.summaries.get("generate", {})
    if "distinct" not in summary:
        return ""
    prompts = sum(summary["responses"].values())
    return (
        f"A prompt got {summary['answers'] / prompts:.0f} answers, {summary['distinct']:.2f} different ones on the mean; "
        f"{summary['all_alike']:,} of {prompts:,} prompts got the same text each time."
    )


def _arms_table(page: PageInputs) -> Table | None:
    """What each arm trains on; None where nothing was ranked."""
    contents = page.run
    rows: list[list[str]] = []
    for arm in (page.method.name, *contents.arms):
        summary = contents.summaries.get("rank" if arm == page.method.name else f"arms/{arm}/rank")
        if summary is None:
            continue
        dropped = ", ".join(f"{reason_words(rule)} {count:,}" for rule, count in summary["dropped"].items()) or "none"
        numbers = [f"{sum(summary['pairs'].values()):,}", f"{summary['prompts']:,} of {summary['records']:,}"]
        means = [NONE if summary[name] is None else number(summary[name], ".2f") for name in ("mean_chosen", "mean_gap")]
        rows.append([page.method.name_of(arm), reason_words(summary["make"]), *numbers, *means, f"{summary['ties']:,}", dropped])
    if not rows:
        return None
    return Table(
        caption="What each arm trains on. Ties: prompts of which several answers are best; the first one counts.",
        head=["Arm", "Made", "Records", "Prompts", "Mean value of chosen", "Mean gap", "Ties", "Prompts dropped"],
        rows=rows,
        words={1, 7},
    )


def _groups(contents: RunContents, count: int) -> list[Group]:
    groups = by_format(record for record in contents.pairs or () if "ratings" in record)
    each = -(-count // len(groups)) if groups else 0
    folder = contents.folder / "rank"
    return [
        Group(label=label_of(name), examples=[_pair(record, folder) for record in spread(records, each)])
        for name, records in groups.items()
    ]


def _pair(record: Record, folder: Path) -> RatedPair:
    cells, columns, width = image_cells(record, folder)
    return RatedPair(
        question=question_of(record["prompt"]),
        chosen=text_of(record["chosen"]),
        rejected=text_of(record["rejected"]),
        chosen_ratings=_in_words(record["ratings"]["chosen"]),
        rejected_ratings=_in_words(record["ratings"]["rejected"]),
        cells=cells,
        columns=columns,
        width=width,
    )


def _in_words(ratings: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {number(value, '.3g')}" for name, value in ratings.items())
