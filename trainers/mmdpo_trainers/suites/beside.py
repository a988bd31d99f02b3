"""Files of a benchmark that lie beside its questions: references, contexts, annotations, pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.errors import DataError
from mmdpo_trainers.suites.suite import Source

PICTURE_FOLDERS = ("", "images", "image", "val2014", "train2014")
"""Where benchmarks keep pictures, in the folder of pictures."""


def beside(folder: Path, names: Sequence[str], title: str) -> Path:
    """The first of some files that is in a folder, `names` relative to it. Raises DataError where none is."""
    found = next((folder / name for name in names if (folder / name).exists()), None)
    if found is None:
        raise DataError(f"{folder} lacks {' or '.join(names)}, which {title} has; give the folder as it is published")
    return found


def picture_beside(source: Source, names: Sequence[str]) -> str:
    """A picture's path in the folder of pictures: the first of its names that is there, or in a folder such as `images`; else the first name."""
    paths = [f"{folder}/{name}".lstrip("/") for name in names for folder in PICTURE_FOLDERS]
    return next((path for path in paths if (source.pictures / path).is_file()), names[0] if names else "")


def texts_of(row: Mapping[str, Any], column: str) -> list[str]:
    """A cell as a list of texts: a list, one text, or nothing."""
    value = row.get(column)
    if value is None or isinstance(value, str):
        return [value] if value else []
    return [str(each) for each in value]


def json_value(file: Path, kind: type, expected: str) -> Any:
    """What a JSON file holds. Raises DataError where it is not JSON, or holds something else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); get the file anew") from error
    if not isinstance(value, kind):
        raise DataError(f"{file}: expected {expected}, got {type(value).__name__}; get the file anew")
    return value


def json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, one a line. Raises DataError, naming the line, for what is none."""
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}, line {number}: not valid JSON ({error}); get the file anew") from error
        if not isinstance(value, dict):
            raise DataError(f"{file}, line {number}: expected an object, got {type(value).__name__}")
        yield value


def rows_by_key(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON object of objects, each with its name as `key`."""
    for key, row in json_value(file, dict, "an object of objects").items():
        if not isinstance(row, dict):
            raise DataError(f"{file}: expected an object under {key!r}, got {type(row).__name__}")
        yield {"key": key, **row}
