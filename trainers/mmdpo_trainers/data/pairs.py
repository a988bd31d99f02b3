"""Preference data for training: reading it, holding a part out, and the replay of single-image pairs."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.config.options import Match
from mmdpo_trainers.data.column_names import answers_alone, pair_remedy
from mmdpo_trainers.data.content import is_empty
from mmdpo_trainers.data.conversation import TEMPLATE_COLUMNS, Conversation, read_prompt, words
from mmdpo_trainers.data.dataset_checks import missing_pictures
from mmdpo_trainers.data.images import image_exists
from mmdpo_trainers.data.left_out import ALLOW
from mmdpo_trainers.data.match import is_right
from mmdpo_trainers.data.pair_records import (
    check_content,
    check_record,
    is_prompt,
    record_images,
    record_rejected_images,
    with_images_from,
)
from mmdpo_trainers.data.records import read_prompts
from mmdpo_trainers.data.sources import load_dataset, undecoded
from mmdpo_trainers.errors import DataError, RunFolderError, StageError
from mmdpo_trainers.files.json_lines import read_jsonl

Record = dict[str, Any]

_PICTURES = ("images", "rejected_images", "image")
_ROWS = 1000
"""Rows of a dataset that are read at once."""
_COLUMNS = ("prompt", "chosen", "rejected")
_ACCEPTED = (
    "preference data is a .jsonl file (one record a line), a .parquet file or a folder of them, or what "
    "Dataset.save_to_disk wrote to a folder"
)


def read_pairs(path: Path, missing: list[str] | None = None, *, views: Sequence[str] = (), prompts: bool = False) -> Any:
    """Preference records with TRL's columns: a list from a .jsonl file, a `datasets.Dataset` from parquet or a saved folder.

    Records with MMPR's columns (arXiv 2411.10442: `question`, `chosen`, `rejected`, and `image`, a picture, a list of them, or none) are given
    TRL's: a question that names no place for its pictures has them in front.

    Picture paths are relative to the file's folder, or to the folder of a dataset; pictures that parts of a prompt hold come in `images`;
    of a dataset these are looked at when a record is read.

    missing: takes the names of records that lack a picture, which are then left out; None: they are refused.
    views: columns of pictures beside `images` and `rejected_images`.
    prompts: records of a .jsonl file may be prompts alone, with neither chosen nor rejected.

    Raises DataError naming the file that is no preference data, or the record that cannot be used.
    """
    if path.is_dir() or path.suffix.lower() == ".parquet":
        return _read_dataset(path, missing, views)
    folder, records = path.resolve().parent, []
    names: set[str] = set()
    gone: dict[str, str] = {}
    for number, record in enumerate(_lines(path), start=1):
        record.setdefault("id", f"line {number}")
        record = _with_trl_columns(record)
        if not (prompts and "prompt" in record and is_prompt(record)):
            _check_columns(path, record, record["id"])
        check_record(record, prompts=prompts)
        record = with_images_from(record, folder, views=views)
        for column, images in _image_columns(record, views):
            if not all(isinstance(image, str) for image in images):
                raise DataError(f"{path}, record {record['id']}: {column} must be paths or data: URLs, got {str(images)[:120]}")
            first = next((image for image in images if not (image.startswith("data:") or image_exists(image))), None)
            if first is not None:
                gone.setdefault(str(record["id"]), first)
        known = str(record["id"]) not in gone
        record["id"] = _own_name(record["id"], names)
        if known:
            records.append(record)
    total = len(names)
    if gone and (missing is None or not records):
        refuse_missing(path, gone, total)
    if missing is not None:
        missing += gone
    return records


def _with_trl_columns(record: Record) -> Record:
    """A record with MMPR's columns with TRL's; any other as it is."""
    if "question" not in record or "prompt" in record:
        return record
    found = {name: value for name, value in record.items() if name not in ("question", "image")}
    image = record.get("image")
    if not is_empty(image):
        found["images"] = [*found.get("images", ()), *(image if isinstance(image, list) else [image])]
    return {**found, "prompt": record["question"]}


def refuse_missing(path: Path, gone: Mapping[str, str], total: int) -> None:
    """Raise DataError for records (name -> picture) whose pictures do not exist."""
    name, picture = next(iter(gone.items()))
    raise DataError(
        f"{path}, record {name}: picture {picture} does not exist, and so it is with {len(gone):,} of {total:,} records; restore them, "
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


def _read_dataset(path: Path, missing: list[str] | None, views: Sequence[str]) -> Any:
    try:
        dataset = load_dataset(path)
    except Exception as error:
        raise DataError(f"{path} cannot be read by `datasets` ({type(error).__name__}: {error}); {_ACCEPTED}") from error
    if dataset is None:
        raise DataError(f"{path} holds neither; {_ACCEPTED}")
    if isinstance(dataset, dict):
        if len(dataset) != 1:
            first = path / next(iter(dataset), "train")
            raise DataError(f"{path} holds several splits ({', '.join(dataset)}); give the folder of one, such as {first}")
        [dataset] = dataset.values()
    elif len(splits := _parquet_splits(path)) > 1:
        raise DataError(
            f"{path} holds parquet files of several splits ({', '.join(splits)}); give a folder with the files of one"
        )
    _check_columns(path, dataset.features, "1")
    layout = "mmpr" if "question" in dataset.features and "prompt" not in dataset.features else "trl"
    # Pictures are opened with their record at hand, so that a damaged one has a name.
    dataset = undecoded(dataset)
    if layout == "mmpr":
        dataset = dataset.rename_column("question", "prompt")
    named = "id" in dataset.features
    given = list(dataset["id"]) if named else [f"row {number}" for number in range(len(dataset))]
    names: set[str] = set()
    ids = [_own_name(name, names) for name in given]
    if not (named and ids == given):
        dataset = (dataset.remove_columns("id") if named else dataset).add_column("id", ids)
    check_contents(dataset)
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    gone = missing_pictures(dataset, (*_PICTURES, *views), str(folder))
    if gone:
        if missing is None or len(gone) == len(dataset):
            refuse_missing(path, {ids[row]: picture for row, picture in gone.items()}, len(dataset))
        else:
            missing += [ids[row] for row in gone]
        dataset = dataset.select([row for row in range(len(dataset)) if row not in gone])
    return dataset.with_transform(
        functools.partial(_rows_with_images_from, folder=str(folder), views=tuple(views), layout=layout)
    )


def _parquet_splits(path: Path) -> list[str]:
    """The splits that parquet files of a folder are named for, as on the Hub: `train-00000-of-00002.parquet`."""
    found = (re.fullmatch(r"(.+)-\d+-of-\d+", file.stem) for file in path.rglob("*.parquet")) if path.is_dir() else ()
    return sorted({match[1] for match in found if match is not None})


def _rows_with_images_from(columns: dict[str, list[Any]], folder: str, views: Sequence[str], layout: str) -> dict[str, list[Any]]:
    """Rows of a dataset, one list a column, through `with_images_from`; a row of which only some columns are asked for, as it is."""
    if "prompt" not in columns and not {"chosen", "rejected"} <= set(columns):
        return columns
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if layout == "mmpr":
        rows = [_with_trl_columns({"question" if name == "prompt" else name: row[name] for name in row}) for row in rows]
    placed = [with_images_from(row, folder, views=views) for row in rows]
    return {name: [row.get(name) for row in placed] for name in dict.fromkeys(name for row in placed for name in row)}


def check_contents(data: Any) -> None:
    """DataError naming the first record of a list, or of a `datasets.Dataset`, with content that would not be read; or of a dictionary of them.

    Of a dataset the texts are read, and no picture.
    """
    import datasets

    if isinstance(data, dict):
        for each in data.values():
            check_contents(each)
    elif isinstance(data, list):
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
    elsewhere = "question" in record or not (
        isinstance(chosen, str | Mapping | None) or getattr(chosen, "dtype", None) is not None
    )
    missing = [column for column in _COLUMNS if column not in record and not (column == "prompt" and elsewhere)]
    if missing:
        raise DataError(
            f"{path}, record {name}: no column {missing[0]!r}; preference data has {', '.join(_COLUMNS)} and images, as in TRL, or "
            f"question, chosen, rejected and image, as in MMPR; {pair_remedy(record)}"
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
