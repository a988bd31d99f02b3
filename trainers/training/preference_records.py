"""What a preference record (TRL's conversational columns) holds: its name in messages, its texts and its pictures."""

from __future__ import annotations

import functools
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import ExifTags, Image, ImageOps

from mmdpo_trainers.data.pictures import open_picture
from mmdpo_trainers.data.records import IMAGE_TOKEN
from mmdpo_trainers.errors import DataError


def record_name(record: Mapping[str, Any]) -> str:
    """What error messages call a record."""
    return str(record["id"]) if record.get("id") is not None else f"without id ({str(record.get('prompt'))[:60]}…)"


def record_picture(record: Mapping[str, Any], image: Any) -> Image.Image:
    """A picture of the record (a path, a Pillow picture, or an undecoded `datasets.Image`) as RGB; DataError names the record."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    data = None
    if isinstance(image, Mapping):
        data, image = image.get("bytes"), image.get("path")
    try:
        if data:
            with Image.open(io.BytesIO(data)) as picture:
                return ImageOps.exif_transpose(picture).convert("RGB")
        return open_picture(image)
    except Exception as error:
        # Pillow's decoders raise many kinds for damaged files.
        raise _unreadable(record, image, error) from error


def _unreadable(record: Mapping[str, Any], image: Any, error: Exception) -> DataError:
    name = image.get("path") if isinstance(image, Mapping) else image
    what = f"picture {name}" if name else "a picture"
    return DataError(f"record {record_name(record)}: {what}: {error}; restore the file, or remove the record")


def picture_digest(record: Mapping[str, Any], image: Any) -> str:
    """A picture's content key: SHA-256 of its file's bytes, or of a Pillow picture's size and RGB pixels. Kinds as in `record_picture`."""
    if isinstance(image, Image.Image):
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        return hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest()
    try:
        if isinstance(image, Mapping):
            if image.get("bytes"):
                return hashlib.sha256(image["bytes"]).hexdigest()
            image = image["path"]
        state = os.stat(image)
        return _file_digest(os.fspath(image), state.st_mtime_ns, state.st_size)
    except Exception as error:
        raise _unreadable(record, image, error) from error


def picture_size(record: Mapping[str, Any], image: Any) -> tuple[int, int]:
    """Width and height of a picture once it is upright; of a file only the header is read. Kinds as in `record_picture`."""
    if isinstance(image, Image.Image):
        return image.size
    source = image
    if isinstance(image, Mapping):
        source = io.BytesIO(image["bytes"]) if image.get("bytes") else image.get("path")
    try:
        with Image.open(source) as picture:
            turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (picture.height, picture.width) if turned else picture.size
    except Exception as error:
        raise _unreadable(record, image, error) from error


@functools.lru_cache(maxsize=200_000)
def _file_digest(path: str, modified: int, size: int) -> str:
    """Of a file that was last written at `modified`; the arguments make an edited file another one."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_images(record: Mapping[str, Any], column: str = "images") -> list[Any]:
    """The record's `images`, or another column of pictures. DataError where they are not a list."""
    images = record.get(column)
    if images is None and column == "images" and record.get("image") is not None:
        raise DataError(
            f"record {record_name(record)}: it has `image`, but pictures are read from `images`; make it a list of one"
        )
    if images is None:
        return []
    if isinstance(images, str) or not isinstance(images, Sequence):
        raise DataError(
            f"record {record_name(record)}: {column} must be a list of pictures, got {str(images)[:120]!r}; "
            f"write [{str(images)[:60]!r}]"
        )
    return list(images)


def record_rejected_images(record: Mapping[str, Any]) -> list[Any] | None:
    """The record's own corrupted pictures (`rejected_images`), one for each of its pictures; None: it has none. DataError otherwise."""
    found, count = record_images(record, "rejected_images"), len(record_images(record))
    if not found:
        return None
    if len(found) != count:
        raise DataError(
            f"record {record_name(record)}: rejected_images must hold one picture for each of images ({count}), got {len(found)}; "
            "repeat in it what is not corrupted"
        )
    return found


def record_target(record: Mapping[str, Any]) -> int | None:
    """Index of the asked-about one among several pictures; None: not told. DataError where there is no such picture."""
    target, count = record.get("target"), len(record_images(record))
    if target is None or count < 2:
        return None
    if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < count:
        raise DataError(
            f"record {record_name(record)}: target must be the 0-based index of the asked-about picture, 0 to {count - 1}, got "
            f"{target!r}; correct it, or leave it out"
        )
    return target


def check_record(record: Mapping[str, Any]) -> None:
    """DataError naming the record where its texts, placeholders or target cannot be used; its pictures are not opened."""
    prompt_text(record)
    record_target(record)
    record_rejected_images(record)
    for column in ("chosen", "rejected"):
        response_text(record, column)


def prompt_text(record: Mapping[str, Any]) -> str:
    """The prompt with one `<image>` for each picture. DataError where they do not match."""
    text, pictures = single_turn(record, "prompt", "user"), len(record_images(record))
    places = text.count(IMAGE_TOKEN)
    if places == 0:
        # TRL's plain-text prompts name no place: pictures come first.
        return f"{IMAGE_TOKEN}\n" * pictures + text
    if places != pictures:
        raise DataError(
            f"record {record_name(record)}: the prompt has {places} {IMAGE_TOKEN} placeholders for {pictures} pictures; "
            "each picture needs exactly one"
        )
    return text


def response_text(record: Mapping[str, Any], column: str) -> str:
    """The response in `chosen` or `rejected`. DataError where there is nothing to learn: `chosen` is empty."""
    text = single_turn(record, column, "assistant")
    if column == "chosen" and not text.strip():
        # A rejected response may be empty: models do end at once.
        raise DataError(f"record {record_name(record)}: chosen is empty; give it a text, or remove the record")
    return text


def single_turn(record: Mapping[str, Any], column: str, role: str) -> str:
    """Text of a conversational column of one turn; a plain string is taken as that turn."""
    messages: Any = record.get(column)
    if isinstance(messages, str):
        return messages
    one = isinstance(messages, Sequence) and len(messages) == 1 and isinstance(messages[0], Mapping)
    if not one or messages[0].get("role") != role:
        raise DataError(
            f"record {record_name(record)}: {column} must be text or a list of one {role} message, got {str(messages)[:120]}"
        )
    content = messages[0].get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else []
    if not parts or not all(isinstance(part, Mapping) for part in parts):
        raise DataError(
            f"record {record_name(record)}: content of {column} must be text or a list of parts such as "
            f"{{'type': 'text', 'text': …}}, got {str(content)[:120]}"
        )
    return "".join(IMAGE_TOKEN if part.get("type") == "image" else part.get("text") or "" for part in parts)
