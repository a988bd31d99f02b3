"""Preference data for training: reading it, holding a part out, and the replay of single-image pairs."""

from __future__ import annotations

import functools
import random
import re
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.config.options import Match
from mmdpo_trainers.data.column_names import answers_alone, pair_remedy
from mmdpo_trainers.data.content import UnreadContent
from mmdpo_trainers.data.conversation import TEMPLATE_COLUMNS, Conversation, read_prompt, words
from mmdpo_trainers.data.image_paths import image_files
from mmdpo_trainers.data.layouts import LayoutReader, LeftOut, UnknownLayout
from mmdpo_trainers.data.left_out import ALLOW, counted
from mmdpo_trainers.data.match import is_right
from mmdpo_trainers.data.pair_records import (
    check_content,
    check_record,
    is_prompt,
    record_images,
    record_rejected_images,
    with_images_from,
)
from mmdpo_trainers.data.pair_rows import LaidOutRows, light_rows, missing_file
from mmdpo_trainers.data.recipes import is_recipe
from mmdpo_trainers.data.records import read_prompts
from mmdpo_trainers.data.streams import FILES, Unreadable, existing, load_dataset, raw_records, undecoded
from mmdpo_trainers.errors import DataError, RunFolderError, StageError
from mmdpo_trainers.files.json_lines import is_stage_file, read_jsonl
from mmdpo_trainers.files.spool import Spool

Record = dict[str, Any]

_PICTURES = ("images", "rejected_images", "image")
_ROWS = 1000
"""Rows of a dataset that are read at once."""
_COLUMNS = ("prompt", "chosen", "rejected")
_ACCEPTED = f"preference data is {FILES}"
_IN_MEMORY = 64 * 2**20
"""Bytes of a file up to which its records are kept in memory."""


def read_pairs(
    path: Path,
    missing: list[str] | None = None,
    *,
    views: Sequence[str] = (),
    prompts: bool = False,
    layouts: LayoutReader | None = None,
) -> Any:
    """Preference records with TRL's columns: a list from a .jsonl or .json file, of a large one on disk, or the rows of a dataset.

    Of parquet or a saved folder with TRL's columns it is a `datasets.Dataset`. Data in another of `layouts.LAYOUTS` are read as TRL's;
    a question that names no place for its pictures has them in front.

    Picture paths are relative to the file's folder, or to the folder of a dataset; pictures that parts of a prompt hold come in `images`;
    of a dataset these are looked at when a record is read.

    missing: takes the names of records that lack a picture, which are then left out; None: they are refused.
    views: columns of pictures beside `images` and `rejected_images`.
    prompts: records of a file may be prompts alone, with neither chosen nor rejected.
    layouts: reads the records, and says afterwards which layout it was and what was left out; None: their columns tell it.

    Raises DataError naming the file that is no preference data, or the record that cannot be used.
    """
    layouts = layouts or LayoutReader(pairs=not prompts)
    if path.is_dir() or path.suffix.lower() == ".parquet":
        return _read_dataset(path, missing, views, layouts)
    folder, own = path.resolve().parent, is_stage_file(path)
    large = path.is_file() and path.stat().st_size > _IN_MEMORY
    records: Any = Spool(tempfile.gettempdir()) if large else []
    names: set[str] = set()
    gone: dict[str, str] = {}
    for place, raw in _places(path):
        raw.setdefault("id", place)
        # What a stage wrote has TRL's columns, beside any that the user's data had.
        record = raw if own else _laid_out(path, raw, layouts, prompts)
        if record is None:
            continue
        check_record(record, prompts=prompts)
        record = with_images_from(record, folder, views=views)
        name = record["id"] = _own_name(record["id"], names)
        for column, images in _image_columns(record, views):
            _check_pictures(f"{path}, record {name}: {column}", images)
            if (first := missing_file(images, image_files)) is not None:
                gone.setdefault(name, first)
        if name not in gone:
            records.append(record)
    if gone and (missing is None or not len(records)):
        refuse_missing(path, gone, len(names))
    if missing is not None:
        missing += gone
    return records


def _check_pictures(where: str, images: Sequence[Any]) -> None:
    if not all(isinstance(image, str) or is_recipe(image) for image in images):
        raise DataError(f"{where} must be paths, data: URLs, base64 or recipes, got {str(images)[:120]}")


def _places(path: Path) -> Iterator[tuple[str, Record]]:
    """The records of a file, each with the name of its place."""
    if path.suffix.lower() != ".json":
        yield from ((f"line {number}", record) for number, record in enumerate(_lines(path), start=1))
        return
    for number, record in enumerate(raw_records(existing(path))):
        if isinstance(record, Unreadable):
            raise DataError(f"{path}: {record.detail}; mend it, or take it out")
        yield f"row {number}", record


def _laid_out(path: Path, raw: Record, layouts: LayoutReader, prompts: bool = False) -> Record | None:
    """The record with TRL's columns; None: it is left out. DataError where no layout fits it, or several."""
    if prompts and "prompt" in raw and is_prompt(raw):
        return raw
    try:
        return layouts.read(raw)
    except LeftOut:
        return None
    except UnknownLayout:
        _check_columns(path, raw, str(raw["id"]))
        return raw  # its columns are there, and what is wrong with them is said next
    except UnreadContent as error:
        raise DataError(f"record {raw['id']}: {error}") from error


def refuse_missing(path: Path, gone: Mapping[str, str], total: int) -> None:
    """Raise DataError for records (name -> picture) whose pictures do not exist."""
    name, picture = next(iter(gone.items()))
    raise DataError(
        f"{path}, record {name}: picture {picture} does not exist, and so it is with {len(gone):,} of {counted(total, 'record')}; restore them, "
        f"or remove the records; or {ALLOW}"
    )


def _image_columns(record: Mapping[str, Any], views: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    yield "images", record_images(record)
    own = record_rejected_images(record)
    if own is not None:
        yield "rejected_images", own
    for column in views:
        yield column, record_images(record, column)


def _own_name(name: Any, taken: set[str]) -> str:
    """The record's id as a text that no record before it has; data often name records by their picture."""
    own, number = str(name), 1
    while own in taken:
        number += 1
        own = f"{name}#{number}"
    taken.add(own)
    return own


def _lines(path: Path) -> Iterator[Record]:
    try:
        yield from read_jsonl(path)
    except RunFolderError as error:
        if not path.is_file():
            raise
        raise DataError(f"{error}; {_ACCEPTED}") from error


def _read_dataset(path: Path, missing: list[str] | None, views: Sequence[str], layouts: LayoutReader) -> Any:
    try:
        dataset = load_dataset(path)
    except DataError as error:
        raise DataError(f"{path} holds neither; {_ACCEPTED}") from error
    except Exception as error:
        raise DataError(f"{path} cannot be read by `datasets` ({type(error).__name__}: {error}); {_ACCEPTED}") from error
    if isinstance(dataset, dict):
        if len(dataset) != 1:
            first = path / next(iter(dataset), "train")
            raise DataError(f"{path} holds several splits ({', '.join(dataset)}); give the folder of one, such as {first}")
        [dataset] = dataset.values()
    elif len(splits := _parquet_splits(path)) > 1:
        raise DataError(
            f"{path} holds parquet files of several splits ({', '.join(splits)}); give a folder with the files of one"
        )
    return _rows(path, undecoded(dataset), missing, views, layouts)


def _rows(path: Path, dataset: Any, missing: list[str] | None, views: Sequence[str], layouts: LayoutReader) -> Any:
    """The records of a dataset whose pictures are not decoded, after a look at their texts and at whether their files are there."""
    if len(dataset) == 0:
        _check_columns(path, dataset.features, "1")
    folder = str(path.resolve() if path.is_dir() else path.resolve().parent)
    as_it_is, names = True, set[str]()
    kept, ids, gone = array("Q"), list[str](), dict[str, str]()
    for number, row in enumerate(light_rows(dataset)):
        row["id"] = f"row {number}" if row.get("id") is None else row["id"]
        record = _laid_out(path, row, layouts)
        if record is None:
            continue
        as_it_is &= record == row
        check_content(record)
        name = _own_name(record["id"], names)
        placed = with_images_from(record, folder, views=views)
        first = next((f for _, images in _image_columns(placed, views) if (f := missing_file(images, image_files))), None)
        if first is not None:
            gone[name] = first
        else:
            kept.append(number)
            ids.append(name)
    if gone and (missing is None or not kept):
        refuse_missing(path, gone, len(names))
    if missing is not None:
        missing += gone
    if not as_it_is:
        # Pictures are opened with their record at hand, so that a damaged one has a name.
        return LaidOutRows(dataset, kept, ids, layouts.read, folder=folder, views=tuple(views))
    if len(kept) < len(dataset):
        dataset = dataset.select(kept)
    if "id" not in dataset.features or list(dataset["id"]) != ids:
        dataset = (dataset.remove_columns("id") if "id" in dataset.features else dataset).add_column("id", ids)
    return dataset.with_transform(functools.partial(_rows_with_images_from, folder=folder, views=tuple(views)))


def _parquet_splits(path: Path) -> list[str]:
    """The splits that parquet files of a folder are named for, as on the Hub: `train-00000-of-00002.parquet`."""
    found = (re.fullmatch(r"(.+)-\d+-of-\d+", file.stem) for file in path.rglob("*.parquet")) if path.is_dir() else ()
    return sorted({match[1] for match in found if match is not None})


def _rows_with_images_from(columns: dict[str, list[Any]], folder: str, views: Sequence[str]) -> dict[str, list[Any]]:
    """Rows of a dataset, one list a column, through `with_images_from`; a row of which only some columns are asked for, as it is."""
    if "prompt" not in columns and not {"chosen", "rejected"} <= set(columns):
        return columns
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    placed = [with_images_from(row, folder, views=views) for row in rows]
    return {name: [row.get(name) for row in placed] for name in dict.fromkeys(name for row in placed for name in row)}


def check_contents(data: Any) -> None:
    """DataError naming the first record of a list, or of a `datasets.Dataset`, with content that would not be read; or of a dictionary of them.

    Of a dataset the texts are read, and no picture. `LaidOutRows` were looked at when they were read.
    """
    import datasets

    if isinstance(data, dict):
        for each in data.values():
            check_contents(each)
    elif isinstance(data, list | Spool):
        for record in data:
            check_content(record)
    elif isinstance(data, datasets.Dataset):
        texts = data.select_columns([name for name in data.column_names if name not in _PICTURES]).with_format("arrow")
        for start in range(0, len(texts), _ROWS):
            for record in texts[start : start + _ROWS].to_pylist():
                check_content(record)


def _check_columns(path: Path, record: Mapping[str, Any], name: str) -> None:
    chosen = record.get("chosen")
    # What chosen and rejected begin with is the prompt of messages.
    elsewhere = not (isinstance(chosen, str | Mapping | None) or getattr(chosen, "dtype", None) is not None)
    missing = [column for column in _COLUMNS if column not in record and not (column == "prompt" and elsewhere)]
    if missing:
        raise DataError(
            f"{path}, record {name}: no column {missing[0]!r}; preference data have one of the layouts that docs/your_data.md lists, such as "
            f"TRL's {', '.join(_COLUMNS)} and images; {pair_remedy(record)}"
            + ("; of answers alone `mmdpo init mia_dpo` makes pairs" if answers_alone(record) else "")
        )


def split(count: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and indices held out, both in order. Raises StageError where nothing would be left to train on."""
    if not 0 <= held_out < 1:
        raise StageError(f"train.held_out: expected a share in [0, 1), got {held_out}")
    chosen = set(random.Random(f"{seed}/held out").sample(range(count), round(held_out * count)))
    kept = [index for index in range(count) if index not in chosen]
    if not kept:
        raise StageError(f"train.held_out: {held_out} leaves none of {count} pairs to train on")
    return kept, sorted(chosen)


def replay_pairs(source: Path, count: int, seed: int, match: Match = "contains") -> list[Record]:
    """`count` preference records about one picture each, drawn from prompt records with answers.

    Chosen is the true answer. Rejected is a wrong one drawn from the true answers to the same question about other pictures, or
    from all where that question has one answer only; `match` says how they are compared with the true one (`is_right`). Records are used
    again only when all have been.

    Raises StageError where the source does not exist, or holds no record with one picture and an answer.
    """
    if count == 0:
        return []
    if not source.is_file():
        raise StageError(
            f"train.replay needs single-image prompts with answers, but {source} does not exist: run augment, give your own with "
            "train.replay_source, or set train.replay to 0"
        )
    pool = [record for record in read_prompts(source) if len(record["images"]) == 1 and record["answer"]]
    answers = sorted({record["answer"] for record in pool})
    by_question: dict[str, set[str]] = {}
    for record in pool:
        by_question.setdefault(words(record["prompt"]), set()).add(record["answer"])
    draw = random.Random(f"{seed}/replay")
    found: list[Record] = []
    while len(found) < count:
        before = len(found)
        for record in draw.sample(pool, len(pool)):
            asked = sorted(by_question[words(record["prompt"])])
            wrong = _wrong_answer(record, asked, draw, match) or _wrong_answer(record, answers, draw, match)
            if wrong is not None and len(found) < count:
                found.append(_pair(record, wrong, len(found)))
        if len(found) == before:
            raise StageError(f"train.replay: {source} has no single-image records with different answers; give another source")
    return found


def _wrong_answer(record: Record, candidates: Sequence[str], draw: random.Random, match: Match) -> str | None:
    """A candidate that is wrong about the record, drawn by trial first: there may be very many candidates."""

    def is_wrong(candidate: str) -> bool:
        return is_right(candidate, record["answer"], options=record.get("options"), match=match) is False

    for _ in range(20):
        candidate = draw.choice(candidates)
        if is_wrong(candidate):
            return candidate
    return next((candidate for candidate in candidates if is_wrong(candidate)), None)


def _pair(record: Record, wrong: str, number: int) -> Record:
    return {
        "id": f"replay/{number}/{record['id']}",
        "format": "single",
        "images": record["images"],
        "prompt": Conversation(read_prompt(record["prompt"])[0]).messages(),
        **{column: record[column] for column in TEMPLATE_COLUMNS if record.get(column) is not None},
        "chosen": [{"role": "assistant", "content": record["answer"].strip()}],
        "rejected": [{"role": "assistant", "content": wrong.strip()}],
        "target": 0,
        "num_images": 1,
    }
