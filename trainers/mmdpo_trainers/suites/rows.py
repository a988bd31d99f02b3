"""Rows of a benchmark's files, one at a time: TSV and CSV, JSON (a list, or an object a line), parquet."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.errors import DataError
from mmdpo_trainers.suites.suite import BadRow

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
_ROWS_AT_ONCE = 64
"""Of a parquet file: its pictures come with the rows."""


def benchmark_files(path: Path) -> list[Path]:
    """The file itself, or those of a folder and the folders in it, by name. Raises DataError where there is none."""
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(
                f"{path}: expected a file of {', '.join(SUFFIXES)}, or a folder of these, got {path.suffix or 'no suffix'}"
            )
        return [path]
    if not path.is_dir():
        raise DataError(f"{path} does not exist: give the benchmark's file, or the folder of its files")
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
    if not found:
        raise DataError(f"{path} holds no file of {', '.join(SUFFIXES)}; give the folder of the benchmark's files")
    return found


def columns_of(file: Path) -> list[str]:
    """The columns of a file: of JSON, those of its first record. Raises DataError where it cannot be read."""
    if file.suffix.lower() == ".parquet":
        return list(_parquet(file).schema_arrow.names)
    if file.suffix.lower() in (".tsv", ".csv"):
        with _table(file) as lines:
            return list(next(csv.reader(lines, delimiter=_delimiter(file)), []))
    first = next((row for row in rows_of(file) if isinstance(row, dict)), {})
    return list(first)


def rows_of(file: Path) -> Iterator[dict[str, Any] | BadRow]:
    """Each row's cells that hold something; a BadRow for a line that is none. Raises DataError where the file cannot be read."""
    suffix = file.suffix.lower()
    if suffix in (".tsv", ".csv"):
        yield from _table_rows(file)
    elif suffix == ".parquet":
        for batch in _parquet(file).iter_batches(batch_size=_ROWS_AT_ONCE):
            yield from (_held(row) for row in batch.to_pylist())
    else:
        yield from _json_rows(file)


def _held(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None and value != ""}


def _delimiter(file: Path) -> str:
    return "\t" if file.suffix.lower() == ".tsv" else ","


def _table(file: Path) -> Any:
    # A cell holds whole pictures.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    return file.open(encoding="utf-8-sig", newline="")


def _table_rows(file: Path) -> Iterator[dict[str, Any] | BadRow]:
    try:
        with _table(file) as lines:
            table = csv.reader(lines, delimiter=_delimiter(file))
            names: Sequence[str] = next(table, [])
            for cells in table:
                if not cells:
                    continue
                if len(cells) != len(names):
                    yield BadRow("broken_row", f"line {table.line_num}: {len(cells)} cells where the first line has {len(names)}")
                else:
                    yield _held(dict(zip(names, cells, strict=True)))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(
            f"{file} cannot be read ({error}): expected UTF-8 text with a line of column names; get the file anew"
        ) from error


def _json_rows(file: Path) -> Iterator[dict[str, Any] | BadRow]:
    with file.open("rb") as lines:
        start = lines.read(1024).lstrip()
        if start.startswith(b"["):
            try:
                items = json.loads(file.read_bytes())
            except ValueError as error:
                raise DataError(f"{file} is not valid JSON ({error}); get the file anew") from error
            for number, item in enumerate(items, start=1):
                yield (
                    _held(item)
                    if isinstance(item, dict)
                    else BadRow("broken_row", f"entry {number} is no object: {str(item)[:60]}")
                )
            return
        lines.seek(0)
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
                if not isinstance(item, dict):
                    raise ValueError(f"expected an object, got {type(item).__name__}")
            except ValueError as error:
                yield BadRow("broken_row", f"line {number}: {error}")
            else:
                yield _held(item)


def _parquet(file: Path) -> Any:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as parquet ({error}); get the file anew") from error
