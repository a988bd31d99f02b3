"""What can be said of preference data before training without opening a picture: files that do not exist, pairs of equal answers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from mmdpo_kernels.losses import LOSSES, values_of
from mmdpo_trainers.data.images import ImageError, image_exists, local_path
from mmdpo_trainers.data.pair_records import record_name
from mmdpo_trainers.errors import DataError

_ROWS = 1000
"""Rows of a dataset that are read at once."""


def missing_pictures(dataset: Any, columns: Sequence[str], folder: str) -> dict[int, str]:
    """Row -> the first file of its pictures that does not exist, of a `datasets.Dataset` whose pictures are not decoded.

    folder: what paths are relative to. Pictures' bytes are not read.
    """
    gone: dict[int, str] = {}
    names = [name for name in columns if name in dataset.features]
    rows: Any = dataset.select_columns(names).with_format("arrow") if names else []
    for start in range(0, len(rows), _ROWS):
        table = rows[start : start + _ROWS]
        for name in names:
            for row, path in _paths(table.column(name).combine_chunks()):
                if not image_exists(placed := os.path.normpath(os.path.join(folder, path))):
                    gone.setdefault(start + row, placed)
    return dict(sorted(gone.items()))


def _paths(column: Any) -> Iterator[tuple[int, str]]:
    """(row, path) of the pictures in an Arrow array that are files; addresses, which are refused by name later, are passed over."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if len(column) == 0:
        return
    rows: Any = range(len(column))
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        rows, column = pc.list_parent_indices(column).to_pylist(), pc.list_flatten(column)
    if pa.types.is_struct(column.type):
        within = pc.is_valid(pc.struct_field(column, "bytes"))
        column = pc.if_else(within, None, pc.struct_field(column, "path"))
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return
    for row, path in zip(rows, column.to_pylist(), strict=True):
        if not path or path.startswith("data:"):
            continue
        try:
            yield row, str(local_path(path))
        except ImageError:
            continue


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
    if isinstance(data, list):
        found = [record_name(record) for record in data if _equal(record)]
    elif isinstance(data, datasets.Dataset):
        texts = data.select_columns([name for name in ("id", "chosen", "rejected") if name in data.column_names]).with_format(
            "arrow"
        )
        for start in range(0, len(texts), _ROWS):
            rows = enumerate(texts[start : start + _ROWS].to_pylist(), start=start)
            found += [str(row.get("id", f"row {number}")) for number, row in rows if _equal(row)]
    if found and len(found) == len(data):
        raise DataError(
            f"chosen and rejected are the same in all {len(data):,} records, such as {found[0]}; give each record a better and a worse answer"
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
    return (
        f"{len(names):,} of {total:,} records have the same text as chosen and as rejected ({shown}): between them nothing is learned; "
        "correct them, or take them out"
    )
