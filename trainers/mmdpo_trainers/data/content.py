"""What a record may hold beside the texts and pictures that are read: one table for all readers.

Content that nobody reads must not vanish: a column, a message's field or a content part that the field uses for content, and that is
not read here, is refused with its place. What carries none (id, source, score, …), and what is empty, is passed over.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmdpo_trainers.data.images import ImageError, base64_bytes, embedded_bytes, local_path

IMAGE_TOKEN = "<image>"
"""What stands for a picture in texts."""

_WITHOUT_IT = "remove it where the texts and pictures stand without it, or leave the record out"

_COLUMNS: tuple[tuple[str, str], ...] = (
    (
        r"(?:(?:prompt|chosen|rejected|input)_)?(?:video|audio|speech)s?(?:_(?:path|url|file|byte)s?)?",
        f"only text and pictures are read; {_WITHOUT_IT}",
    ),
    (r"images?_?\d+|(?:chosen|prompt)_images?", "pictures are read from images, a list of all of them; put it there"),
    (r"tools|chat_template_kwargs", f"questions are taken out of their conversation here; {_WITHOUT_IT}"),
    (r"tool_calls|functions|function_call|documents", f"write it into a message, or {_WITHOUT_IT}"),
    (r"system|system_prompt", f"make it the prompt's first message, of role system, or {_WITHOUT_IT}"),
    (
        r"(?:ref|reference)_(?:chosen|rejected)_logps",
        "precompute_ref_log_probs keeps the reference's log-probabilities itself; take it out",
    ),
    (r"history", f"give its turns as messages of the prompt, or {_WITHOUT_IT}"),
)
"""Names of a record's columns that are refused, and what to do."""

_FIELDS: tuple[tuple[str, str], ...] = (
    *_COLUMNS,
    (r"thinking|reasoning|reasoning_content|reasoning_details|thoughts?", f"write it into the content, or {_WITHOUT_IT}"),
    (r"tool_call_id|tool_responses|refusal", _WITHOUT_IT),
    (r"images?|image_(?:path|url)s?", "pictures are read from images of the record, or from parts of the content; put it there"),
)
"""The same for a message's fields beside role and content."""

_PART_FIELDS = frozenset({"type", "index", "id", "cache_control", "detail"})
"""Of content parts, beside what the part is; all others are refused."""
_IMAGE_FIELDS = ("image", "image_url", "url", "path", "base64", "bytes")
"""Where an image part may hold its own picture."""


class UnreadContent(Exception):
    """Content that is not read, or not what its place is for: where, what came, and what to do."""


@dataclass(frozen=True)
class ImagePart:
    """A picture's place among the texts of a message."""

    picture: Any = None
    """Its own picture, see `ImageSource`; None: the next one of the record's list."""


def check_columns(record: Mapping[str, Any], *, read: Collection[str] = ()) -> None:
    """Raise UnreadContent naming the first column that holds content which is not read. read: what this reader reads all the same."""
    _check(record, _COLUMNS, "column ", read)


def check_fields(message: Mapping[str, Any], place: str, *, read: Collection[str] = ("role", "content")) -> None:
    """Raise UnreadContent naming the first field of a message that holds content which is not read. place: such as `prompt[0]`."""
    _check(message, _FIELDS, place, read)


def _check(holder: Mapping[str, Any], refused: tuple[tuple[str, str], ...], place: str, read: Collection[str]) -> None:
    for name, value in holder.items():
        if name in read or (remedy := _remedy(refused, str(name))) is None or is_empty(value):
            continue
        where = f"{place}{name!r}" if place.endswith(" ") else f"{place}[{name!r}]"
        raise UnreadContent(f"{where} is not read, and holds {_shown(value)}; {remedy}")


@functools.lru_cache(maxsize=4096)
def _remedy(refused: tuple[tuple[str, str], ...], name: str) -> str | None:
    """What to do about a name that is refused; records of a file have the same."""
    return next((remedy for pattern, remedy in refused if re.fullmatch(pattern, name, re.IGNORECASE)), None)


def read_parts(content: Any, place: str) -> list[str | ImagePart]:
    """A message's content, a text or a list of parts, as texts and places of pictures in their order.

    place: such as `prompt[0]['content']`. Raises UnreadContent for a part that is neither text nor a picture that can be read.
    """
    if isinstance(content, str):
        return [content]
    if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
        raise UnreadContent(
            f"{place} must be text or a list of parts such as {{'type': 'text', 'text': …}}, got {str(content)[:120]!r}"
        )
    return [part if isinstance(part, str) else _part(part, f"{place}[{index}]") for index, part in enumerate(content)]


def _part(part: Any, place: str) -> str | ImagePart:
    if not isinstance(part, Mapping):
        raise UnreadContent(f"{place} must be a part such as {{'type': 'text', 'text': …}}, got {str(part)[:120]!r}")
    held = [name for name, value in part.items() if name not in _PART_FIELDS and not is_empty(value)]
    # Qwen's parts go without a type.
    kind = part.get("type") or ("text" if "text" in part and held in (["text"], []) else next(iter(held), None))
    if kind not in ("text", "image", "image_url"):
        raise UnreadContent(f"{place} is of type {str(kind)[:60]!r}, which is not read: expected text or image; {_WITHOUT_IT}")
    read = ("text",) if kind == "text" else _IMAGE_FIELDS
    other = next((name for name in held if name not in read), None)
    if other is not None:
        raise UnreadContent(
            f"{place}[{other!r}] is not read in a part of type {kind}, and holds {_shown(part[other])}; {_WITHOUT_IT}"
        )
    if kind != "text":
        return _image_part(part, kind, held, place)
    if not isinstance(part.get("text"), str):
        raise UnreadContent(f"{place}['text'] must be text, got {part.get('text')!r}")
    return str(part["text"])


def _image_part(part: Mapping[str, Any], kind: str, held: Sequence[str], place: str) -> ImagePart:
    if "bytes" in held:
        # An undecoded `datasets.Image` says beside its bytes where they came from.
        held = [name for name in held if name != "path"]
    if len(held) > 1:
        raise UnreadContent(f"{place} gives its picture as {' and as '.join(held)}; leave one of them")
    if not held:
        if kind == "image_url":
            raise UnreadContent(f"{place}['image_url'] must be a data: URL or a file's path, got {part.get('image_url')!r}")
        return ImagePart()
    value = part[held[0]]
    if isinstance(value, Mapping) and not is_empty(value.get("url")):
        value = value["url"]
    try:
        if held[0] == "base64" and isinstance(value, str) and not value.startswith("data:"):
            value = base64_bytes(value)
        if embedded_bytes(value) is None:
            local_path(value)
    except ImageError as error:
        raise UnreadContent(f"{place}[{held[0]!r}]: {error}") from error
    return ImagePart(value)


def is_empty(value: Any) -> bool:
    """Whether a column's or field's value holds nothing: null, no text, JSON of nothing, or a collection of such."""
    if value is None:
        return True
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, bytes):
        return not value
    if isinstance(value, Mapping):
        return all(is_empty(each) for each in value.values())
    return isinstance(value, Sequence) and all(is_empty(each) for each in value)


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
