"""What can be said of preference data before training without opening a picture: pairs of equal answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmdpo_kernels.losses import LOSSES, values_of
from mmdpo_trainers.data.left_out import counted
from mmdpo_trainers.data.pair_records import record_name
from mmdpo_trainers.data.pair_rows import LaidOutRows
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.files.spool import Spool

_ROWS = 1000
"""Rows of a dataset that are read at once."""


def equal_answers(data: Any, losses: Sequence[str]) -> list[str]:
    """Names of the records of a list, or of a `datasets.Dataset`, whose chosen and rejected are the same; of other data none.

    None either where no loss looks at the rejected answer, as in training on chosen answers alone. Raises DataError where that is so with
    all.
    """
    import datasets

    found: list[str] = []
    # A loss that is not known is refused with the other settings.
    if not any(value.branch == "rejected" for name in losses if name in LOSSES for value in values_of(name)):
        return found
    if isinstance(data, list | Spool):
        found = [record_name(record) for record in data if _equal(record)]
    elif isinstance(data, LaidOutRows):
        found = [record_name(record) for record in data.texts() if _equal(record)]
    elif isinstance(data, datasets.Dataset):
        texts = data.select_columns([name for name in ("id", "chosen", "rejected") if name in data.column_names]).with_format(
            "arrow"
        )
        for start in range(0, len(texts), _ROWS):
            rows = enumerate(texts[start : start + _ROWS].to_pylist(), start=start)
            found += [str(row.get("id", f"row {number}")) for number, row in rows if _equal(row)]
    if found and len(found) == len(data):
        raise DataError(
            f"chosen and rejected are the same in all of {counted(len(data), 'record')}, such as {found[0]}; give each record a better and a "
            "worse answer"
        )
    return found


def _equal(record: Any) -> bool:
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return chosen.strip() == rejected.strip()
    return chosen is not None and bool(chosen == rejected)


def equal_answers_line(names: Sequence[str], total: int) -> str:
    """A warning about those records; of many the first."""
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    have = "has" if len(names) == 1 else "have"
    return (
        f"{len(names):,} of {counted(total, 'record')} {have} the same text as chosen and as rejected ({shown}): between them nothing is "
        "learned; correct them, or take them out"
    )
