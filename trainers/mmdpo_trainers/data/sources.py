"""Single-image question-answer records out of instruction and preference data of any layout of `layouts.LAYOUTS`.

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
from mmdpo_trainers.data.images import ImageError, as_url, content_key, embedded_bytes, locate_image
from mmdpo_trainers.data.layouts import LayoutReader, LeftOut, Record, UnknownLayout
from mmdpo_trainers.data.outages import is_folder
from mmdpo_trainers.data.records import IMAGE_TOKEN, not_utf8
from mmdpo_trainers.data.streams import Unreadable, existing, raw_records
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.files.atomic import write_atomic

DUPLICATE = "duplicate_record"
"""Reason of a record that repeats another."""

_EXPECTED = (
    "expected the columns of a layout that docs/your_data.md lists, such as `prompt` with `completion`, or `conversations`"
)
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
    source: str | Path,
    *,
    image_folder: str | Path | None = None,
    cache: str | Path,
    limit: int | None = None,
    layouts: LayoutReader | None = None,
) -> Iterator[SourceRecord | Problem]:
    """Yield the records of a source, and a Problem for each that cannot be used.

    source: a file or folder as `streams.raw_records` takes them, in one of `layouts.LAYOUTS`. image_folder: what picture paths are relative to
    and may not leave; the source's own folder if None. cache: folder that pictures stored inside records are written to, named by their
    content. limit: read at most this many records. layouts: reads them, and says afterwards which layout it was; None: their columns tell it.
    A conversation of several turns gives several records, with `-q0`, `-q1`, … added to the id. No two get the same id.

    Raises DataError where the source itself is missing or broken.
    """
    path = existing(source)
    root = Path(image_folder) if image_folder is not None else (path if path.is_dir() else path.parent)
    if not is_folder(root):
        raise DataError(f"image folder {root} does not exist: give the folder that the records' picture paths are relative to")
    seen = _Seen()
    for index, found in enumerate(_laid_out(itertools.islice(raw_records(path), limit), layouts)):
        if isinstance(found, Problem):
            yield replace(found, row=index)
            continue
        record_id, problem = _unique_id(found, index, seen)
        if problem is not None:
            yield replace(problem, row=index)
            if problem.dropped:
                continue
        for item in _read_record(record_id, found, root, Path(cache)):
            item = replace(item, row=index)
            yield from (item,) if item.id == record_id else _unique_turn(item, index, seen)


def read_texts(source: str | Path, layouts: LayoutReader | None = None) -> Iterator[TextRecord | Problem]:
    """Yield what a source, as `read_source` takes them, asks without a picture, and a Problem for each such record that cannot be used.

    Of a conversation the first turn: later ones are about what was said before. Records with pictures are passed over.
    Raises DataError where the source itself is missing or broken.
    """
    seen = _Seen()
    for index, found in enumerate(_laid_out(raw_records(existing(source)), layouts)):
        if isinstance(found, Problem):
            yield replace(found, row=index)
            continue
        if any(not is_empty(found.get(column)) for column in _PICTURE_COLUMNS):
            continue
        record_id, problem = _unique_id(found, index, seen)
        if problem is not None:
            yield replace(problem, row=index)
            if problem.dropped:
                continue
        if (item := _read_text(record_id, found)) is not None:
            yield replace(item, row=index)


def _laid_out(raws: Iterable[Record | Unreadable], layouts: LayoutReader | None) -> Iterator[Record | Problem]:
    """The records with TRL's columns, or LLaVA's; a Problem for each that is in no layout."""
    layouts = layouts or LayoutReader(pairs=False)
    for index, raw in enumerate(raws):
        if isinstance(raw, Unreadable):
            yield Problem(raw.name, raw.reason, raw.detail)
            continue
        try:
            yield layouts.read(raw)
        except UnknownLayout:
            yield Problem(_name(raw, index), "no_conversation", f"{_EXPECTED}; {renaming(raw, ('prompt', 'completion'))}")
        except LeftOut as left:
            yield Problem(_name(raw, index), left.reason, str(left))
        except UnreadContent as unread:
            yield Problem(_name(raw, index), "unread_content", str(unread))


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


class _Seen:
    """Names of records, each with what it was given for: eight bytes of a hash for either, as there may be millions.

    Two of a million names are taken for one another once in 37 million files; one of them then gets a number behind it.
    """

    def __init__(self) -> None:
        self._digests: dict[int, int] = {}

    def __contains__(self, name: str) -> bool:
        return _number(name) in self._digests

    def __getitem__(self, name: str) -> int:
        return self._digests[_number(name)]

    def __setitem__(self, name: str, digest: int) -> None:
        self._digests[_number(name)] = digest


def _number(text: str) -> int:
    """64 bits of a text's hash."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _unique_turn(item: SourceRecord | Problem, index: int, seen: _Seen) -> Iterator[SourceRecord | Problem]:
    """A turn under an id that no other record has: another record may be called like it."""
    name = next(name for name in _names(item.id) if name not in seen)
    seen[name] = 0
    if name != item.id:
        detail = f"a turn of record {index} has the id {item.id!r} of another record"
        yield Problem(name, "duplicate_id", detail, dropped=False)
    yield replace(item, id=name)


def _name(raw: Mapping[str, Any], index: int) -> str:
    given = raw.get("id")
    name = str(given) if isinstance(given, str | int) and str(given).strip() else f"row{index}"
    return name.encode(errors="backslashreplace").decode()


def _names(id: str) -> Iterator[str]:
    return itertools.chain([id], (f"{id}~{count}" for count in itertools.count(2)))


def _unique_id(raw: Mapping[str, Any], index: int, seen: _Seen) -> tuple[str, Problem | None]:
    record_id = _name(raw, index)
    digest = _number(json.dumps(raw, sort_keys=True, default=repr))
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
    answer_name = next(name for name in ("chosen", "completion") if raw.get(name) is not None)
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
    picture = as_url(pictures[0])
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
