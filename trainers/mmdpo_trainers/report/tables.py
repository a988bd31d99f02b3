"""Tables of the page that several sections or the layout show, and how numbers are written in them."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .contents import RunContents
from .intervals import Proportion

PACKAGES = ("mmdpo-kernels", "torch", "transformers", "peft", "accelerate", "datasets", "pillow", "matplotlib")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of ready text and proportions; the first cell of a row is its heading. `total`: the last row is set apart."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | Proportion | None]]
    total: bool = False


@dataclass(frozen=True, kw_only=True)
class Group:
    """The examples of one format."""

    label: str
    examples: list[Any]


def percent(value: float | None) -> str:
    """A fraction as a percentage with one decimal; the space does not break."""
    return "–" if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def bare(value: float) -> str:
    """A fraction as a percentage without its sign, for the ends of an interval."""
    return f"{100 * value:.1f}"


def points(value: float | None) -> str:
    """A difference of fractions in signed percentage points."""
    if value is None:
        return "–"
    text = f"{100 * value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def lost_table(contents: RunContents) -> Table | None:
    """Records left out, by stage and reason; None where there are none."""
    found = {"augment": contents.summaries.get("augment"), "evaluate": contents.evaluation_data, **contents.summaries}
    losses = {name: summary["lost"] for name, summary in found.items() if summary and summary.get("lost")}
    if not losses:
        return None
    rows = []
    for name, loss in losses.items():
        rows += [[name, reason.replace("_", " "), f"{count:,}"] for reason, count in loss["reasons"].items()]
        rows.append([name, "all records left out, of those read", f"{loss['records']:,} of {loss['of']:,}"])
    return Table(
        caption="Records that were left out, by stage and reason; a record may have several. Each is in the stage's problems.jsonl.",
        head=["Stage", "Reason", "Number"],
        rows=rows,
    )


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
    return Table(caption="Versions", head=["", "Version"], rows=rows)
