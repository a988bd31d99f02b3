"""Records of a file, one after the other, in bounded memory: JSON lines, a JSON array, parquet, or a folder that `datasets` saved."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from mmdpo_trainers.errors import DataError

FILES = "a .jsonl file, a .json list, a .parquet file or a folder of them, or a folder that Dataset.save_to_disk wrote"
"""What is read, for messages."""

_CHUNK = 1 << 20
"""Characters of a JSON array that are read at once; more where a record is longer."""
_NEAR_THE_END = 16
"""Characters: an error this near to the end of what was read may be a record that goes on."""
_ROWS = 256
"""Rows of a parquet file that are read at once."""
_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class Unreadable:
    """What stands in a record's place and is none: its name, a reason, and the detail."""

    name: str
    reason: str
    detail: str


def existing(source: str | Path) -> Path:
    """The path of a source. DataError where there is none."""
    if not Path(source).exists():
        raise DataError(f"data source {source} does not exist: give {FILES}")
    return Path(source)


def raw_records(path: Path) -> Iterator[dict[str, Any] | Unreadable]:
    """Yield the records of a file or folder (`FILES`); of a dataset pictures are not decoded.

    However large the file, some hundred rows or a megabyte of it are in memory. Raises DataError where it is missing or broken.
    """
    existing(path)
    suffix = "" if path.is_dir() else path.suffix.lower()
    readers = {".json": _array_items, ".jsonl": _line_items}
    for index, item in enumerate(readers.get(suffix, _dataset_rows)(path)):
        if isinstance(item, dict | Unreadable):
            yield item
        else:
            detail = f"record {index}: expected an object, got {type(item).__name__}"
            yield Unreadable(f"row{index}", "not_a_record", detail)


def _line_items(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                yield Unreadable(f"line{number}", "invalid_json", f"line {number} of {path.name}: {error}")


def _array_items(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as file:
        text = _ArrayText(path, file)
        try:
            yield from text.items()
        except UnicodeDecodeError as error:
            raise text.broken(str(error)) from error


class _ArrayText:
    """A JSON array of which a part at a time is in memory.

    The values are the standard library's, as those of JSON lines are: parsers in C that read from a stream, such as ijson's, put a
    question mark for half a surrogate pair, which is to cost its record, and refuse what `json` writes for infinite numbers.
    """

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file
        self._buffer, self._at, self._count = "", 0, 0
        self._decoder = json.JSONDecoder()

    def items(self) -> Iterator[Any]:
        """The array's items. DataError for what is no array, or breaks off."""
        if self._character() != "[":
            kind = type(self._value()).__name__
            raise DataError(
                f"data source {self._path}: expected a list of records, got {kind}; for one object a line, name it .jsonl"
            )
        self._at += 1
        separator = "]" if self._character() == "]" else ","
        self._at += separator == "]"
        while separator == ",":
            self._character()
            yield self._value()
            self._count += 1
            separator = self._character()
            if separator not in (",", "]"):
                raise self.broken(f"Expecting ',' or ']' behind it, got {separator!r}")
            self._at += 1
        if self._character():
            raise self.broken("there is more behind the list")

    def broken(self, what: str) -> DataError:
        """The error of what is no JSON, with the place."""
        near = self._buffer[self._at : self._at + 40]
        return DataError(
            f"data source {self._path} is not valid JSON (record {self._count}: {what}, at {near!r}); for one object a line, name it .jsonl"
        )

    def _read(self, characters: int) -> bool:
        more = self._file.read(characters)
        if more:
            self._buffer, self._at = self._buffer[self._at :] + more, 0
        return bool(more)

    def _character(self) -> str:
        """The next one that is no white space; "" at the end."""
        while True:
            if (space := _SPACE.match(self._buffer, self._at)) is not None:
                self._at = space.end()
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._read(_CHUNK):
                return ""

    def _value(self) -> Any:
        size = _CHUNK
        while True:
            wrong, value, end = None, None, len(self._buffer)
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                wrong = error.msg
                if not wrong.startswith("Unterminated string") and error.pos < len(self._buffer) - _NEAR_THE_END:
                    raise self.broken(wrong) from error
            # Numbers at the end of what was read may have further digits.
            whole = end + (_NEAR_THE_END if isinstance(value, int | float) else 0) < len(self._buffer)
            if whole or not self._read(size):
                break
            size *= 2
        if wrong is not None:
            raise self.broken(wrong)
        self._at = end
        return value


def _dataset_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        yield from _saved_rows(path) if is_saved(path) else _parquet_rows(path)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"data source {path} cannot be read by `datasets` ({type(error).__name__}: {error})") from error


def is_saved(path: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote this folder."""
    return path.is_dir() and any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))


def parquet_files(path: Path) -> list[Path]:
    """A parquet file, or those in a folder, in order. DataError where there is none."""
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.suffix.lower() == ".parquet" for file in files):
        raise DataError(f"data source {path}: expected {FILES}")
    return files


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    for file in parquet_files(path):
        with pq.ParquetFile(file, pre_buffer=False) as table:
            for batch in table.iter_batches(batch_size=_ROWS):
                yield from batch.to_pylist()


def _saved_rows(path: Path) -> Iterator[dict[str, Any]]:
    import datasets

    data = datasets.load_from_disk(str(path))
    if isinstance(data, dict):
        if "train" not in data and len(data) != 1:
            raise DataError(f"data source {path} has the splits {', '.join(data)} and no `train`; give the folder of one split")
        data = data["train"] if "train" in data else next(iter(data.values()))
    yield from undecoded(data)


def undecoded(data: Any) -> Any:
    """A `datasets.Dataset` whose pictures, sounds and videos, alone or in lists, come as `bytes` and `path`."""
    import datasets

    media = (datasets.Image, datasets.Audio, datasets.Video)
    for column, feature in list(data.features.items()):
        each = getattr(feature, "feature", None)
        if isinstance(feature, media):
            data = data.cast_column(column, type(feature)(decode=False))
        elif isinstance(each, media):
            data = data.cast_column(column, datasets.List(type(each)(decode=False)))
    return data


def load_dataset(path: Path) -> Any:
    """What `Dataset.save_to_disk` wrote to a folder (a dictionary where it was one of splits), or parquet: a file, or all in a folder.

    Its rows stay in the file. Raises DataError where it is neither, and what `datasets` raises.
    """
    import datasets

    if is_saved(path):
        return datasets.load_from_disk(str(path))
    return datasets.Dataset.from_parquet([str(file) for file in parquet_files(path)], split="train")
