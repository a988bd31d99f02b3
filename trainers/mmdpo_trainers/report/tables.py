"""Tables of the page that several sections or the layout show, and cells that are numbers with intervals."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mmdpo_trainers.data.left_out import by_stages
from mmdpo_trainers.data.left_out import reason_words as reason_words

from .contents import RunContents
from .intervals import Estimate, Proportion, mean_estimate
from .numbers import NONE, bare, number, percent

PACKAGES = ("mmdpo-kernels", "torch", "transformers", "peft", "accelerate", "datasets", "pillow", "matplotlib")


class Measured(NamedTuple):
    """A number and its interval, as text."""

    value: str
    interval: str


TableCell = str | Measured


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of ready text; the first cell of a row is its heading.

    total: the last row is set apart. nested: numbers of the rows that are parts of the one before. words: numbers of the columns that hold
    words, which begin at the left.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[TableCell]]
    total: bool = False
    nested: Collection[int] = ()
    words: Collection[int] = ()


@dataclass(frozen=True, kw_only=True)
class Group:
    """The examples of one format."""

    label: str
    examples: list[Any]


def share(p: Proportion | None) -> TableCell:
    """A share in percent with its interval."""
    return NONE if p is None else Measured(percent(p.value), f"{bare(p.low)}–{bare(p.high)}")


def measured(estimate: Estimate | None, spec: str, scale: float = 1.0) -> TableCell:
    """A mean or a difference with its interval, in a format of `number`; scale: 100 for points."""
    if estimate is None:
        return NONE
    low, high = (number(scale * end, spec) for end in (estimate.low, estimate.high))
    return Measured(number(scale * estimate.value, spec), f"{low} to {high}")


def mean(values: Collection[float], spec: str) -> TableCell:
    """The mean of some values, with its interval where there are several."""
    found = mean_estimate(list(values))
    return measured(found, spec) if found else number(next(iter(values)), spec) if values else NONE


def change(estimate: Estimate | None) -> TableCell:
    """A difference of shares in points with its interval."""
    return measured(estimate, "+.1f", 100)


def in_words(cell: TableCell, unit: str = "") -> str:
    """A cell within a sentence."""
    return f"{cell}{unit}" if isinstance(cell, str) else f"{cell.value}{unit}, {cell.interval}"


def lost_table(contents: RunContents) -> Table | None:
    """Records left out, by stage and reason; None where there are none."""
    losses = by_stages({name: summary["lost"] for name, summary in _losses(contents).items()})
    if not losses:
        return None
    rows = []
    for name, loss in losses.items():
        everything = f"{loss['records']:,} of {loss['of']:,}"
        if list(loss["reasons"].values()) == [loss["records"]]:
            rows.append([name, reason_words(next(iter(loss["reasons"]))), everything])
            continue
        rows += [[name, reason_words(reason), f"{count:,}"] for reason, count in loss["reasons"].items()]
        rows.append([name, "all together, of those read", everything])
    return Table(
        caption="Records that were left out, by stage and reason; a record may have several. Each is in the stage's problems.jsonl.",
        head=["Stage", "Reason", "Number"],
        rows=rows,
        words={1},
    )


def lost_fact(contents: RunContents) -> str:
    """How many records were left out; by stage where several left any out, which may be the same ones. Empty before any has finished."""
    losses = by_stages({name: summary["lost"] for name, summary in _losses(contents).items()})
    counts = {name: loss["records"] for name, loss in losses.items()}
    if len(counts) > 1:
        return ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return f"{sum(counts.values()):,}" if counts else "none" if contents.summaries else ""


def data_facts(contents: RunContents) -> list[tuple[str, str]]:
    """The layout of the data, and how many of the trained pairs have two equal answers; nothing of what is not known."""
    layouts = {str(each["layout"]): None for each in contents.summaries.values() if each and each.get("layout")}
    equal = {name: each["equal_answers"] for name, each in contents.summaries.items() if each and each.get("equal_answers")}
    found = [("Layout of the data", ", ".join(layouts))] if layouts else []
    return found + [(f"Pairs with equal answers, {name}", f"{count:,}") for name, count in equal.items()]


def _losses(contents: RunContents) -> dict[str, Any]:
    found = {"augment": contents.summaries.get("augment"), "evaluate": contents.evaluation_data, **contents.summaries}
    return {name: summary for name, summary in found.items() if summary and summary.get("lost")}


def seconds_table(contents: RunContents) -> Table | None:
    """Wall seconds of each finished stage."""
    seconds = {name: float(s["seconds"]) for name, s in contents.summaries.items() if s.get("seconds") is not None}
    if not seconds:
        return None
    rows = [[name, f"{value:,.1f}"] for name, value in seconds.items()]
    rows.append(["All", f"{sum(seconds.values()):,.1f}"])
    return Table(caption="Wall time, interrupted attempts included.", head=["Stage", "Seconds"], rows=rows, total=True)


def versions_table() -> Table:
    """Python, the platform and the packages a result may depend on."""
    rows = [["Python", platform.python_version()], ["Platform", f"{platform.system()} {platform.machine()}"]]
    for package in PACKAGES:
        try:
            rows.append([package, importlib.metadata.version(package)])
        except importlib.metadata.PackageNotFoundError:
            continue
    return Table(caption="What it ran with.", head=["Package", "Version"], rows=rows)
