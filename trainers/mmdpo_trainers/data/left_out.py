"""Records that were left out, by reason: counted where they are lost, said where people look, and asked about where they are most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdpo_trainers.errors import DataError

ALLOW = "pass --allow-missing (allow_missing: true) to go on with the rest"


def lost(of: int, reasons: Mapping[str, int], records: int | None = None) -> dict[str, Any]:
    """A stage's `lost`, as its summary has it; empty where nothing was. records: how many, where one may have several reasons."""
    found = {reason: count for reason, count in sorted(reasons.items()) if count}
    return {"lost": {"records": sum(found.values()) if records is None else records, "of": of, "reasons": found}} if found else {}


def named(reasons: Mapping[str, int]) -> str:
    """`missing: 275, not a picture: 3`"""
    return ", ".join(f"{reason_words(reason)}: {count}" for reason, count in reasons.items())


def reason_words(reason: str) -> str:
    """A reason's name for readers."""
    return reason.replace("_", " ")


def counted(count: int, noun: str) -> str:
    """`1 record`, `1,200 records`"""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def by_stages(losses: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """What stages lost (`lost`), once for those that lost the same of the same data: `evaluate/before, evaluate/after`."""
    found: dict[str, Mapping[str, Any]] = {}
    for loss in losses.values():
        stages = ", ".join(name for name, other in losses.items() if other == loss)
        found[stages] = loss
    return found


def left_out_line(summary: Mapping[str, Any]) -> str:
    """What a stage's summary says of records left out and of formats that are empty; nothing where it says nothing."""
    sentences = []
    if loss := summary.get("lost"):
        records = f"{loss['records']:,} of {counted(loss['of'], 'record')} left out" if loss["records"] else "no record lost"
        sentences.append(f"{records} ({named(loss['reasons'])})")
    counts = summary.get("prompts") or summary.get("counts") or {}
    empty = [name for name, count in counts.items() if not count] if isinstance(counts, Mapping) else []
    if empty:
        sentences.append(f"none of format {', '.join(empty)}")
    return "; ".join(sentences)


def check_left_out(share: float, allow: bool, message: str) -> None:
    """Raise DataError with `message` where more than half is lost and that is not allowed."""
    if share > 0.5 and not allow:
        raise DataError(f"{message}; or {ALLOW}")
