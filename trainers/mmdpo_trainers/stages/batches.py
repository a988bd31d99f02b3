"""Fixed batches over records, with the results of each batch in a JSON-lines file that a killed run continues."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.data.image_paths import image_files
from mmdpo_trainers.data.images import content_key, image_exists, is_made
from mmdpo_trainers.data.left_out import counted, lost
from mmdpo_trainers.data.records import read_prompts, relative_images
from mmdpo_trainers.errors import DataError, StageError
from mmdpo_trainers.files.json_lines import JsonLines, is_stage_file
from mmdpo_trainers.processes import ranks
from mmdpo_trainers.processes.parts import merge_parts, part_files, write_shards
from mmdpo_trainers.stages.ahead import Ahead
from mmdpo_trainers.stages.context import StageContext

Record = dict[str, Any]


def read_records(path: Path, what: str) -> list[Record]:
    """The prompt records of a file, with whatever earlier stages added. Raises StageError where there are none."""
    records = list(read_prompts(path))
    if not records:
        raise no_records(path, what)
    return records


def no_records(path: Path, what: str) -> StageError:
    """That a file holds nothing."""
    remedy = (
        "see the summary of the stage that wrote it, or give your own with --input"
        if is_stage_file(path)
        else "write some into it"
    )
    return StageError(f"{path} holds no {what}; {remedy}")


def own_records(context: StageContext, path: Path, what: str) -> tuple[list[Record], dict[str, Any]]:
    """`read_records`, and what of them is left out (`lost`), where that is allowed: those with pictures that do not exist."""
    records = read_records(path, what)
    gone = missing_images(records) if context.config.allow_missing else {}
    kept = [record for record in records if record["id"] not in gone]
    if not kept:
        raise DataError(
            f"{path}: none of its {counted(len(records), 'record')} has its pictures, such as {next(iter(gone.values()))}; mend the paths"
        )
    return kept, lost(len(records), {"missing": len(gone)})


def missing_images(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Record's id -> its first picture that does not exist."""
    exists = functools.lru_cache(maxsize=None)(image_exists)
    files = ((record["id"], (file for image in record["images"] for file in image_files(image))) for record in records)
    gone = ((id, next((file for file in its if not exists(file)), None)) for id, its in files)
    return {id: file for id, file in gone if file is not None}


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
    *,
    opened: bool = False,
) -> Path:
    """Write each record with what `work` adds to it, batch by batch, into `file_name` of the stage's folder; returns the file.

    Batches are cut from the records sorted by number of pictures (file order among equals), which keeps padding small. They do
    not depend on what is already in the file: an interrupted batch is done again whole, and gives what it would have given.
    `work(batch_number, batch)` returns one mapping per record. Several processes share the batches, and leave the same file.
    opened: `work` gets the records with their pictures opened, which is done while it is at the batch before.
    """
    if batch_size < 1:
        raise StageError(f"{context.stage}.batch_size: expected 1 or more, got {batch_size}")
    ordered = sorted(records, key=lambda record: len(record["images"]))
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    path = context.folder / file_name

    def prepare(number: int) -> list[Record]:
        check_images(batches[number], context)
        if not opened:
            return batches[number]
        # Stages without a model do without torch.
        from mmdpo_trainers.models.encode import load_images

        return [{**record, "images": load_images(record)} for record in batches[number]]

    def write(number: int, missing: Collection[str]) -> list[Record]:
        results = zip(batches[number], work(number, ahead.take(number)), strict=True)
        return [{**_stored(record, context), **added} for record, added in results if record["id"] in missing]

    with contextlib.closing(Ahead(prepare, len(batches), step=ranks.world_size())) as ahead:
        _write_batches(path, batches, write, context, description)
    return path


def _write_batches(
    path: Path,
    batches: Sequence[Sequence[Record]],
    write: Callable[[int, Collection[str]], list[Record]],
    context: StageContext,
    description: str,
) -> None:
    """Have the batches written that are missing, by this process or by those of the launch."""
    ids = [[record["id"] for record in batch] for batch in batches]
    if ranks.is_distributed() or part_files(path):
        write_shards(path, ids, write, context.progress, description)
        return
    ordered = [id for each in ids for id in each]
    with JsonLines(path) as out, context.progress.task(description, len(ordered), len(out), context.folder) as task:
        holes = any(id not in out for id in ordered[: len(out)])
        for number, each in enumerate(ids):
            missing = [id for id in each if id not in out]
            if missing:
                out.append(write(number, missing))
                task.advance(len(missing))
    if holes:
        # Somebody took a damaged line out.
        merge_parts(path, ids)


def check_images(batch: Sequence[Mapping[str, Any]], context: StageContext) -> None:
    """Raise DataError, naming the record, for a picture that the run made and that is not what it was: its name is its content.

    Runs of older versions have such pictures; recipes are checked where they are drawn.
    """
    for record in batch:
        for image in record["images"]:
            if not is_made(image):
                continue
            file = Path(image)
            own = file.is_relative_to(context.run.path)
            if own and file.is_file() and content_key(file.read_bytes()) != file.stem:
                stage = file.relative_to(context.run.path).parts[0]
                raise DataError(
                    f"record {record['id']}: picture {file} was changed or damaged since it was made; put it back, or make all anew with "
                    f"--restart {stage}"
                )


def count_formats(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Records by format."""
    return dict(Counter(record["format"] for record in records))


def _stored(record: Record, context: StageContext) -> Record:
    columns = [name for name in ("images", "rejected_images") if record.get(name)]
    return {**record, **{name: relative_images(record[name], context.folder, context.run.path) for name in columns}}
