"""Fixed batches over records, with the results of each batch in a JSON-lines file that a killed run continues."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.data.records import read_prompts, relative_images
from mmdpo_trainers.errors import DataError, StageError
from mmdpo_trainers.run_folder import JsonLines
from mmdpo_trainers.stages import StageContext

Record = dict[str, Any]


def read_records(path: Path, what: str) -> list[Record]:
    """The prompt records of a file, with whatever earlier stages added. Raises StageError where there are none."""
    records = list(read_prompts(path))
    if not records:
        raise StageError(f"{path} holds no {what}; see the summary of the stage that wrote it, or give your own with --input")
    return records


def require(records: Sequence[Mapping[str, Any]], names: Mapping[str, type | tuple[type, ...]], path: Path) -> None:
    """Raise DataError naming the first record that lacks one of the fields, or has it with another type."""
    for record in records:
        for name, kind in names.items():
            if not isinstance(record.get(name), kind):
                raise DataError(
                    f"{path}, record {record['id']!r}: field {name!r} is missing or not valid, got {record.get(name)!r}"
                )


def run_batches(
    context: StageContext,
    file_name: str,
    records: Sequence[Record],
    batch_size: int,
    work: Callable[[int, Sequence[Record]], Sequence[Mapping[str, Any]]],
    description: str,
) -> Path:
    """Write each record with what `work` adds to it, batch by batch, into `file_name` of the stage's folder; returns the file.

    Batches are cut from the records sorted by number of pictures (file order among equals), which keeps padding small. They do
    not depend on what is already in the file: an interrupted batch is done again whole, and gives what it would have given.
    `work(batch_number, batch)` returns one mapping per record.
    """
    if batch_size < 1:
        raise StageError(f"{context.stage}.batch_size: expected 1 or more, got {batch_size}")
    ordered = sorted(records, key=lambda record: len(record["images"]))
    path = context.folder / file_name
    with JsonLines(path) as out, context.progress.task(description, total=len(ordered), completed=len(out)) as task:
        for number, start in enumerate(range(0, len(ordered), batch_size)):
            batch = ordered[start : start + batch_size]
            missing = [record["id"] for record in batch if record["id"] not in out]
            if not missing:
                continue
            results = zip(batch, work(number, batch), strict=True)
            out.append({**_stored(record, context), **added} for record, added in results if record["id"] in missing)
            task.advance(len(missing))
    return path


def batch_seed(*parts: int | str) -> int:
    """A 63-bit seed of its own for everything that must not depend on what ran before it."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def count_formats(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Records by format."""
    return dict(Counter(record["format"] for record in records))


def _stored(record: Record, context: StageContext) -> Record:
    columns = [name for name in ("images", "rejected_images") if record.get(name)]
    return {**record, **{name: relative_images(record[name], context.folder, context.run.path) for name in columns}}
