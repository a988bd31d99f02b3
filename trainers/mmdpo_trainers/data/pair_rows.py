"""Rows of a `datasets.Dataset` as preference records: their texts and picture paths at once, their pictures when a record is read."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mmdpo_trainers.data.images import image_exists
from mmdpo_trainers.data.pair_records import with_images_from

Record = dict[str, Any]

_ROWS = 1000
"""Rows of a dataset that are read at once."""
_INSIDE = "data:;base64,"
"""What stands for a picture whose bytes are in the dataset."""


def light_rows(dataset: Any) -> Iterator[Record]:
    """The rows of a dataset whose pictures are not decoded, with their paths alone, or an empty `data:` URL for bytes that are inside."""
    arrow = dataset.with_format("arrow")
    for start in range(0, len(dataset), _ROWS):
        table = arrow[start : start + _ROWS]
        columns = {name: _light(table.column(name).combine_chunks()) for name in table.column_names}
        yield from (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def _light(column: Any) -> list[Any]:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and (_is_picture(kind.value_type) or _is_bytes(kind.value_type)):
        flat = iter(_light(pc.list_flatten(column)))
        lengths = pc.list_value_length(column).to_pylist()
        return [None if length is None else [next(flat) for _ in range(length)] for length in lengths]
    if _is_bytes(kind):
        return [_INSIDE if inside else None for inside in pc.is_valid(column).to_pylist()]
    if _is_picture(kind):
        inside = pc.is_valid(pc.struct_field(column, "bytes"))
        return list(pc.if_else(inside, _INSIDE, pc.struct_field(column, "path").cast(pa.string())).to_pylist())
    return list(column.to_pylist())


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_picture(kind: Any) -> bool:
    """Whether a column is of pictures as `datasets` hold them: bytes, or else a path."""
    import pyarrow as pa

    if not pa.types.is_struct(kind) or {field.name for field in kind} != {"bytes", "path"}:
        return False
    return _is_bytes(kind.field("bytes").type) or bool(pa.types.is_null(kind.field("bytes").type))


class LaidOutRows(Sequence[Record]):
    """Rows of a dataset in another layout than TRL's, which become records when they are read."""

    def __init__(
        self, dataset: Any, rows: array[int], ids: Sequence[str], read: Callable[[Record], Record], **placing: Any
    ) -> None:
        """rows: those that are records, with their `ids`. read: a row to a record. placing: `folder` and `views` of `with_images_from`."""
        self._dataset, self._rows, self._ids, self._read, self._placing = dataset, rows, list(ids), read, placing

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        record = self._read(self._dataset[self._rows[index]])
        return with_images_from({**record, "id": self._ids[index]}, **self._placing)

    def texts(self) -> Iterator[Record]:
        """The records with their pictures' paths alone."""
        light = light_rows(self._dataset.select(self._rows))
        return ({**self._read(row), "id": name} for row, name in zip(light, self._ids, strict=True))


def missing_file(images: Sequence[Any], files: Callable[[Any], Sequence[str]]) -> str | None:
    """The first file of pictures that does not exist."""
    return next((file for image in images for file in files(image) if not image_exists(file)), None)
