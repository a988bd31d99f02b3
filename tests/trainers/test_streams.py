"""Files of any size are read record by record: what is in memory does not grow with the file, and a break costs what is behind it."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pytest

from mmdpo_trainers.data import streams
from mmdpo_trainers.data.streams import Unreadable, raw_records
from mmdpo_trainers.errors import DataError

ODD = [
    {"a": 'a "quoted" [text], with a \\ and {braces}', "b": [1, -2.5e3, None, True, {"c": []}]},
    {"half": "\ud800", "whole": "\U0001f600", "big": 123456789012345678901234567890, "over": float("inf")},
    {},
]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_read_as_json_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None) -> None:
    """Wherever the parts end that are read at once; numbers, which may go on, among them."""
    monkeypatch.setattr(streams, "_CHUNK", chunk)
    file = tmp_path / "a.json"
    file.write_text(json.dumps([*ODD, 12345, 0.25, "x"], indent=indent) + "\n")
    found = list(raw_records(file))
    assert found[: len(ODD)] == ODD
    assert [each.detail for each in found[len(ODD) :] if isinstance(each, Unreadable)] == [
        f"record {number}: expected an object, got {kind}" for number, kind in ((3, "int"), (4, "float"), (5, "str"))
    ]
    file.write_text("  [ ]  ")
    assert list(raw_records(file)) == []


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf[{"id": 1}]')
    assert list(raw_records(tmp_path / "a.json")) == [{"id": 1}]


@pytest.mark.parametrize(
    ("text", "read", "words"),
    [
        ('[{"id": 1}, {"id": 2}, {bad}, ' + '{"id": 3},' * 9 + "]", 2, "record 2: Expecting property name"),
        ('[{"id": 1}, {"id": ', 1, "record 1: Expecting value"),
        ('[{"id": 1}, {"id": "x', 1, "record 1: Unterminated string"),
        ('[{"id": 1}', 1, "record 1: Expecting ',' or ']' behind it, got ''"),
        ('[{"id": 1} {"id": 2}]', 1, "record 1: Expecting ',' or ']' behind it, got '{'"),
        ('[{"id": 1},]', 1, "record 1: Expecting value"),
        ('[{"id": 1}] {}', 1, "more behind the list"),
        ("", 0, "record 0: Expecting value"),
        ('{"id": 1}\n{"id": 2}', 0, "expected a list of records, got dict; for one object a line, name it .jsonl"),
    ],
)
def test_a_list_that_breaks_off_is_an_error_with_its_record(tmp_path: Path, text: str, read: int, words: str) -> None:
    (tmp_path / "a.json").write_text(text)
    reading = raw_records(tmp_path / "a.json")
    assert [next(reading)["id"] for _ in range(read)] == list(range(1, read + 1))  # type: ignore[index]
    with pytest.raises(DataError, match=re.escape(words)):
        next(reading)


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path, batch_size=500)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "saved"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(streams, "_CHUNK", 1 << 16)
    rows = [{"id": number, "text": f"{number} " * 200} for number in range(4000)]
    path = write(tmp_path, kind, rows)
    next(raw_records(path))  # what it imports is no part of the file
    tracemalloc.start()
    total = sum(int(row["id"]) for row in raw_records(path) if isinstance(row, dict))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == sum(range(4000))
    assert most < 1_500_000, "of 4 MB"


def test_the_first_records_are_there_before_the_file_is_read(tmp_path: Path) -> None:
    """What is behind them may be broken: nobody has looked at it."""
    file = tmp_path / "a.json"
    file.write_text('[{"id": 0},' + " " * (streams._CHUNK + 9) + "broken")
    assert next(raw_records(file)) == {"id": 0}
    parquet = tmp_path / "b"
    parquet.mkdir()
    datasets.Dataset.from_list([{"id": 0}]).to_parquet(parquet / "0.parquet")
    (parquet / "1.parquet").write_text("broken")
    reading = raw_records(parquet)
    assert next(reading) == {"id": 0}
    with pytest.raises(DataError, match="cannot be read by `datasets`"):
        next(reading)


@pytest.mark.nightly
def test_a_list_of_fifty_megabytes(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    with file.open("w") as out:
        out.write("[")
        out.writelines(f"{',' * (number > 0)}{json.dumps({'id': number, 'text': 'word ' * 100})}" for number in range(100_000))
        out.write("]")
    assert file.stat().st_size > 50_000_000
    tracemalloc.start()
    count = sum(1 for _ in raw_records(file))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 100_000 and most < 6 * streams._CHUNK
