"""The tables that papers about preference tuning report: MIA-DPO's five benchmarks with several pictures, mDPO's of hallucination."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Column:
    """One figure of one benchmark. scale: what it is multiplied by to be what the paper prints."""

    label: str
    suite: str
    figure: str
    group: tuple[str, str] | None = None
    """Kind and name of the group that the paper reports, where there is such; else all."""
    scale: float = 100.0
    instead: str | None = None
    """A benchmark that stands in where the first was not asked."""


@dataclass(frozen=True)
class Published:
    """A table of a paper. mean: whether its last column is the mean of the others, shown where all are there."""

    title: str
    paper: str
    columns: Sequence[Column]
    mean: bool = False


PUBLISHED: Mapping[str, Published] = {
    "several_images": Published(
        "Benchmarks with several pictures, as in MIA-DPO",
        "arXiv 2410.17637",
        (
            Column("MMMU", "mmmu", "accuracy", ("split", "validation")),
            Column("BLINK", "blink", "accuracy"),
            Column("Mantis", "mantis", "accuracy"),
            Column("NLVR2", "nlvr2", "accuracy"),
            Column("MVBench", "mvbench", "accuracy"),
        ),
        mean=True,
    ),
    "hallucination": Published(
        "Hallucination, as in mDPO",
        "arXiv 2406.11839",
        (
            Column("MMHal-Bench score", "mmhal", "score", scale=1.0),
            Column("MMHal-Bench HalRate", "mmhal", "hallucination_rate", scale=1.0),
            Column("Object HalBench CHAIRs", "object_halbench_judged", "chair_s", instead="object_halbench"),
            Column("Object HalBench CHAIRi", "object_halbench_judged", "chair_i", instead="object_halbench"),
            Column("AMBER CHAIRs", "amber", "chair"),
            Column("AMBER Cover.", "amber", "cover"),
            Column("AMBER HalRate", "amber", "hallucination_rate"),
            Column("AMBER Cog.", "amber", "cog"),
        ),
    ),
}
"""Name -> table."""

AVERAGE = "Average"


def published_tables(models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Name -> `title`, `paper`, `columns` and `rows` (model -> column -> value or null) of each table that has a figure.

    models: who was asked (`before`, `after`, an arm) -> key of a benchmark -> its figures, as `figures_of` has them.
    """
    found = {}
    for name, table in PUBLISHED.items():
        rows = {model: _row(table, figures) for model, figures in models.items()}
        if any(value is not None for row in rows.values() for value in row.values()):
            columns = [column.label for column in table.columns] + ([AVERAGE] if table.mean else [])
            found[name] = {"title": table.title, "paper": table.paper, "columns": columns, "rows": rows}
    return found


def _row(table: Published, figures: Mapping[str, Any]) -> dict[str, float | None]:
    row = {column.label: _value(column, figures) for column in table.columns}
    if table.mean:
        values = [value for value in row.values() if value is not None]
        row[AVERAGE] = statistics.fmean(values) if len(values) == len(table.columns) else None
    return row


def _value(column: Column, figures: Mapping[str, Any]) -> float | None:
    """Of the first key that is the benchmark's."""
    suites = (column.suite, column.instead)
    found = next((each for suite in suites for each in figures.values() if each["suite"] == suite), None)
    if found is None:
        return None
    if column.group is None:
        chosen = found["figures"]
    else:
        kind, name = column.group
        chosen = found["by"].get(kind, {}).get(name) or found["figures"]
    value = (chosen.get(column.figure) or {}).get("value")
    return None if value is None else column.scale * value
