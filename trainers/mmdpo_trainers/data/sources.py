"""Single-image question-answer records out of LLaVA's conversation JSON and of `datasets` sources with TRL's columns.

A record that cannot be used becomes a `Problem` with its id and a reason; it never stops the reading and never passes silently.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmdpo_trainers.data.column_names import renaming
from mmdpo_trainers.data.content import ImagePart, UnreadContent, check_columns, check_fields, is_empty, read_parts
from mmdpo_trainers.data.images import ImageError, content_key, embedded_bytes, locate_image
from mmdpo_trainers.data.outages import is_folder
from mmdpo_trainers.data.records import IMAGE_TOKEN, not_utf8
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.files.atomic import write_atomic

DUPLICATE = "duplicate_record"
"""Reason of a record that repeats another."""

_ASKS = ("human", "user")
_ANSWERS = ("gpt", "assistant")
_SYSTEM = ("system", "system_prompt")
_PICTURE_COLUMNS = ("images", "image")

_Turn = tuple[str, str]
"""Role and text."""


@dataclass(frozen=True)
class SourceRecord:
    """One question about one picture, with its answer."""

    id: str
    picture: Path
    question: str
    answer: str
    options: tuple[str, ...] | None = None
    row: int = field(default=-1, compare=False)
    """Number of its record in the source, from 0; the turns of a conversation share it."""


@dataclass(frozen=True)
class TextRecord:
    """One question without a picture, with its answer."""

    id: str
    question: str
    answer: str
    options: tuple[str, ...] | None = None
    row: int = field(default=-1, compare=False)
    """As of a `SourceRecord`."""


@dataclass(frozen=True)
class Problem:
    """Something about a record that the user should know. dropped=False: the record is used all the same."""

    id: str
    reason: str
    detail: str
    dropped: bool = True
    row: int = field(default=-1, compare=False)

    @property
    def key(self) -> str:
        """Identity in problems.jsonl."""
        return f"{self.id}: {self.reason}"

    def to_json(self) -> dict[str, Any]:
        return {"key": self.key, "id": self.id, "reason": self.reason, "dropped": self.dropped, "detail": self.detail}


class _BadRecord(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def read_source(
    source: str | Path, *, image_folder: str | Path | None = None, cache: str | Path, limit: int | None = None
) -> Iterator[SourceRecord | Problem]:
    """Yield the records of a source, and a Problem for each that cannot be used.

    source: a .json or .jsonl file (LLaVA's `id`, `image`, `conversations`, or TRL's columns), a parquet file, a folder saved with
    `datasets.save_to_disk`, or a folder of parquet files. image_folder: what picture paths are relative to and may not leave; the
    source's own folder if None. cache: folder that pictures stored inside a dataset are written to, named by their content.
    limit: read at most this many records. A conversation of several turns gives several, with `-q0`, `-q1`, … added to the id. No
    two records get the same id.

    Raises DataError where the source itself is missing or broken.
    """
    path = Path(source)
    if not path.exists():
        raise DataError(f"data source {path} does not exist: give a .json or .jsonl file, a parquet file or a `datasets` folder")
    root = Path(image_folder) if image_folder is not None else (path if path.is_dir() else path.parent)
    if not is_folder(root):
        raise DataError(f"image folder {root} does not exist: give the folder that the records' picture paths are relative to")
    seen: dict[str, str] = {}
    for index, raw in enumerate(_raw_records(path)):
        if limit is not None and index >= limit:
            return
        if isinstance(raw, Problem):
            yield replace(raw, row=index)
            continue
        record_id, problem = _unique_id(raw, index, seen)
        if problem is not None:
            yield replace(problem, row=index)
            if problem.dropped:
                continue
        for item in _read_record(record_id, raw, root, Path(cache)):
            item = replace(item, row=index)
            yield from (item,) if item.id == record_id else _unique_turn(item, index, seen)


def read_texts(source: str | Path) -> Iterator[TextRecord | Problem]:
    """Yield what a source, as `read_source` takes them, asks without a picture, and a Problem for each such record that cannot be used.

    Of a conversation the first turn: later ones are about what was said before. Records with pictures are passed over.
    Raises DataError where the source itself is missing or broken.
    """
    path = Path(source)
    if not path.exists():
        raise DataError(f"data source {path} does not exist: give a .json or .jsonl file, a parquet file or a `datasets` folder")
    seen: dict[str, str] = {}
    for index, raw in enumerate(_raw_records(path)):
        if isinstance(raw, Problem):
            yield replace(raw, row=index)
            continue
        if any(not is_empty(raw.get(column)) for column in _PICTURE_COLUMNS):
            continue
        record_id, problem = _unique_id(raw, index, seen)
        if problem is not None:
            yield replace(problem, row=index)
            if problem.dropped:
                continue
        if (item := _read_text(record_id, raw)) is not None:
            yield replace(item, row=index)


def _read_text(record_id: str, raw: Mapping[str, Any]) -> TextRecord | Problem | None:
    """None: the messages hold a picture."""
    try:
        turns, _, pictures, options = _checked(raw)
        if pictures:
            return None
        question, answer = _asked_and_answered(turns[0], turns[1])
    except _BadRecord as bad:
        return Problem(record_id, bad.reason, bad.detail)
    except UnreadContent as unread:
        return Problem(record_id, "unread_content", str(unread))
    if IMAGE_TOKEN in turns[0][1]:
        return Problem(record_id, "no_picture", f"the question has {IMAGE_TOKEN}, and the record no picture")
    return TextRecord(record_id, question, answer, options)


def _unique_turn(item: SourceRecord | Problem, index: int, seen: dict[str, str]) -> Iterator[SourceRecord | Problem]:
    """A turn under an id that no other record has: another record may be called like it."""
    name = next(name for name in _names(item.id) if name not in seen)
    seen[name] = ""
    if name != item.id:
        detail = f"a turn of record {index} has the id {item.id!r} of another record"
        yield Problem(name, "duplicate_id", detail, dropped=False)
    yield replace(item, id=name)


def _names(id: str) -> Iterator[str]:
    return itertools.chain([id], (f"{id}~{count}" for count in itertools.count(2)))


def _unique_id(raw: Mapping[str, Any], index: int, seen: dict[str, str]) -> tuple[str, Problem | None]:
    given = raw.get("id")
    record_id = str(given) if isinstance(given, str | int) and str(given).strip() else f"row{index}"
    record_id = record_id.encode(errors="backslashreplace").decode()
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True, default=repr).encode()).hexdigest()
    # LLaVA's own files use one id for several conversations, so an id alone proves nothing.
    for name in _names(record_id):
        if name not in seen:
            break
        if seen[name] == digest:
            return name, Problem(f"{name}@{index}", DUPLICATE, f"record {index} repeats record {name!r} word for word")
    seen[name] = digest
    if name == record_id:
        return name, None
    return name, Problem(name, "duplicate_id", f"record {index} has the id {record_id!r} of another record", dropped=False)


def _raw_records(path: Path) -> Iterator[dict[str, Any] | Problem]:
    if path.suffix.lower() == ".json":
        items: Iterable[Any] = _json_items(path)
    elif path.suffix.lower() == ".jsonl":
        items = _jsonl_items(path)
    else:
        items = _dataset_rows(path)
    for index, item in enumerate(items):
        if isinstance(item, dict | Problem):
            yield item
        else:
            yield Problem(f"row{index}", "not_a_record", f"record {index}: expected an object, got {type(item).__name__}")


def _json_items(path: Path) -> list[Any]:
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"data source {path} is not valid JSON ({error}); for one object a line, name it .jsonl") from error
    if not isinstance(items, list):
        raise DataError(f"data source {path}: expected a list of records, got {type(items).__name__}")
    return items


def _jsonl_items(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                yield Problem(f"line{number}", "invalid_json", f"line {number} of {path.name}: {error}")


def _dataset_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        data = load_dataset(path)
        if data is None:
            raise DataError(f"data source {path}: expected .json, .jsonl, .parquet, or a folder that `datasets` saved")
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"data source {path} cannot be read by `datasets` ({type(error).__name__}: {error})") from error
    if isinstance(data, dict):
        if "train" not in data and len(data) != 1:
            raise DataError(f"data source {path} has the splits {', '.join(data)} and no `train`; give the folder of one split")
        data = data["train"] if "train" in data else next(iter(data.values()))
    yield from undecoded(data)


def load_dataset(path: Path) -> Any:
    """What `Dataset.save_to_disk` wrote to a folder (a dictionary where it was one of splits), or parquet: a file, or all in a folder.

    None: it is neither. Raises what `datasets` raises.
    """
    import datasets

    if path.is_dir() and any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        return datasets.load_from_disk(str(path))
    files = sorted(str(file) for file in path.rglob("*.parquet")) if path.is_dir() else [str(path)]
    if not files or not all(file.lower().endswith(".parquet") for file in files):
        return None
    return datasets.Dataset.from_parquet(files, split="train")


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


def _read_record(record_id: str, raw: Mapping[str, Any], root: Path, cache: Path) -> Iterator[SourceRecord | Problem]:
    try:
        turns, system, pictures, options = _checked(raw)
        picture = _picture(raw, turns, pictures, root, cache)
    except _BadRecord as bad:
        yield Problem(record_id, bad.reason, bad.detail)
        return
    except ImageError as bad_image:
        yield Problem(record_id, bad_image.reason, bad_image.detail)
        return
    except UnreadContent as unread:
        yield Problem(record_id, "unread_content", str(unread))
        return
    if system:
        detail = f"prompts are one turn of the user's, so the system prompt is left out: {system[:200]!r}"
        yield Problem(record_id, "system_prompt", detail, dropped=False)
    several = len(turns) > 2
    for number, (asked, answered) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
        turn_id = f"{record_id}-q{number}" if several else record_id
        try:
            yield SourceRecord(turn_id, picture, *_asked_and_answered(asked, answered), options)
        except _BadRecord as bad:
            yield Problem(turn_id, bad.reason, bad.detail)


def _checked(raw: Mapping[str, Any]) -> tuple[list[_Turn], str, list[Any], tuple[str, ...] | None]:
    """`_turns` of a record, and its options. Raises _BadRecord, or UnreadContent."""
    if (wrong := not_utf8(raw)) is not None:
        raise _BadRecord("invalid_text", wrong)
    check_columns(raw, read=_SYSTEM)
    return *_turns(raw), _options(raw)


def _asked_and_answered(asked: _Turn, answered: _Turn) -> tuple[str, str]:
    question, answer = asked[1].replace(IMAGE_TOKEN, "").strip(), answered[1].strip()
    if not question:
        raise _BadRecord("empty_question", "the question has no text")
    if not answer:
        raise _BadRecord("empty_answer", "the answer has no text")
    if IMAGE_TOKEN in answer:
        raise _BadRecord("image_token_in_answer", f"the answer contains {IMAGE_TOKEN}, which stands for a picture")
    return question, answer


def _turns(raw: Mapping[str, Any]) -> tuple[list[_Turn], str, list[Any]]:
    """(role, text) of a record's turns: question, answer, question, answer, …; its system prompt; the pictures that questions hold."""
    pictures: list[Any] = []
    if "conversations" in raw:
        turns = _messages(raw["conversations"], "conversations", "from", "value", pictures)
    elif "messages" in raw:
        turns = _messages(raw["messages"], "messages", "role", "content", pictures)
    else:
        turns = _trl_turns(raw, pictures)
    system = next((raw[name] for name in _SYSTEM if not is_empty(raw.get(name))), "")
    if turns and turns[0][0] == "system":
        system, turns = turns[0][1].strip() or system, turns[1:]
    if not turns:
        raise _BadRecord("no_conversation", "there is no question")
    wanted = [_ASKS, _ANSWERS] * ((len(turns) + 1) // 2)
    if len(turns) % 2 or any(role not in roles for (role, _), roles in zip(turns, wanted, strict=True)):
        roles = ", ".join(str(role) for role, _ in turns[:6])
        raise _BadRecord("wrong_roles", f"turns must alternate human and gpt (user and assistant), got {roles}")
    return turns, str(system), pictures


def _trl_turns(raw: Mapping[str, Any], pictures: list[Any]) -> list[_Turn]:
    answer_name = next((name for name in ("chosen", "completion") if raw.get(name) is not None), None)
    if answer_name is None:
        expected = "expected `conversations`, `messages`, or `prompt` with `chosen` or `completion`"
        raise _BadRecord("no_conversation", f"{expected}; {renaming(raw, ('prompt', 'completion'))}")
    answer, prompt = raw[answer_name], raw.get("prompt")
    turns: list[_Turn] = []
    if isinstance(prompt, str):
        turns.append(("user", prompt))
    elif prompt is not None:
        turns += _messages(prompt, "prompt", "role", "content", pictures)
    if isinstance(answer, str):
        turns.append(("assistant", answer))
    else:
        turns += _messages(answer, answer_name, "role", "content", pictures)
    return turns


def _messages(value: Any, name: str, role_key: str, text_key: str, pictures: list[Any]) -> list[_Turn]:
    """The turns of a list of messages. pictures: gets those that parts of the messages hold themselves."""
    if not isinstance(value, list):
        raise _BadRecord("not_text", f"{name} must be a list of turns, got {type(value).__name__}")
    turns = []
    for index, turn in enumerate(value):
        if not isinstance(turn, Mapping):
            raise _BadRecord("not_text", f"{name}[{index}] must have {role_key!r} and {text_key!r}, got {type(turn).__name__}")
        content = turn.get(text_key)
        if not isinstance(content, str | list):
            raise _BadRecord("not_text", f"{name}[{index}][{text_key!r}] must be text, got {type(content).__name__}")
        check_fields(turn, f"{name}[{index}]", read=(role_key, text_key))
        parts = read_parts(content, f"{name}[{index}][{text_key!r}]")
        pictures += [part.picture for part in parts if isinstance(part, ImagePart) and part.picture is not None]
        turns.append((str(turn.get(role_key)), "\n".join(IMAGE_TOKEN if isinstance(part, ImagePart) else part for part in parts)))
    return turns


def _options(raw: Mapping[str, Any]) -> tuple[str, ...] | None:
    options = raw.get("options")
    if options is None:
        return None
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise _BadRecord("not_text", f"options must be a list of texts, got {options!r}")
    return tuple(options)


def _picture(raw: Mapping[str, Any], turns: list[_Turn], within: list[Any], root: Path, cache: Path) -> Path:
    """The file of the record's one picture. within: pictures that parts of its messages hold."""
    pictures = list(within)
    for column in _PICTURE_COLUMNS:
        value = raw.get(column)
        if not is_empty(value):
            pictures += value if isinstance(value, list) else [value]
    if not pictures:
        raise _BadRecord("no_picture", "the record has no picture")
    places = sum(text.count(IMAGE_TOKEN) for _, text in turns[::2])
    if len(pictures) > 1 or places > 1:
        detail = f"expected one picture, got {len(pictures)} and {places} {IMAGE_TOKEN} in the questions"
        raise _BadRecord("several_pictures", detail)
    picture = pictures[0]
    data = embedded_bytes(picture)
    if data is not None:
        return _cached(data, cache)
    if isinstance(picture, Mapping):
        picture = picture.get("path")
    if not isinstance(picture, str) or not picture:
        raise _BadRecord("no_picture", f"the picture must be a path, got {picture!r}")
    return locate_image(picture, root)


def _cached(data: bytes, cache: Path) -> Path:
    file = cache / content_key(data)
    if not file.exists():
        write_atomic(file, data)
    return file
