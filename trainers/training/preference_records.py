"""What a preference record (TRL's conversational columns) holds: its name in messages, its texts and its pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from mmdpo_trainers.data.pictures import PictureError, open_picture
from mmdpo_trainers.data.records import IMAGE_TOKEN
from mmdpo_trainers.errors import DataError


def record_name(record: Mapping[str, Any]) -> str:
    """What error messages call a record."""
    return str(record["id"]) if record.get("id") is not None else f"without id ({str(record.get('prompt'))[:60]}…)"


def record_picture(record: Mapping[str, Any], image: Any) -> Image.Image:
    """A picture of the record (a path, a Pillow picture, or an undecoded `datasets.Image`) as RGB; DataError names the record."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, Mapping):
        image = io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"]
    try:
        if isinstance(image, io.BytesIO):
            with Image.open(image) as picture:
                return picture.convert("RGB")
        return open_picture(image)
    except (PictureError, OSError) as error:
        name = record_name(record)
        raise DataError(f"record {name}: picture {image}: {error}; restore the file, or remove the record") from error


def prompt_text(record: Mapping[str, Any]) -> str:
    """The prompt with one `<image>` for each picture. DataError where they do not match."""
    text, pictures = single_turn(record, "prompt", "user"), len(record.get("images") or [])
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


def single_turn(record: Mapping[str, Any], column: str, role: str) -> str:
    """Text of a conversational column of one turn; a plain string is taken as that turn."""
    messages = record.get(column)
    if isinstance(messages, str):
        return messages
    if not isinstance(messages, Sequence) or len(messages) != 1 or messages[0].get("role") != role:
        raise DataError(
            f"record {record_name(record)}: {column} must be text or a list of one {role} message, got {str(messages)[:120]}"
        )
    content = messages[0].get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else []
    return "".join(IMAGE_TOKEN if part.get("type") == "image" else part.get("text") or "" for part in parts)
