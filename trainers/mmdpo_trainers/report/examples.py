"""Single records as readers see them: the question, the text of an answer, the pictures with the target marked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mmdpo_trainers.data.image_paths import placed
from mmdpo_trainers.data.images import ImageError, open_image

from .images import SIDE, data_uri, outlined, sized

_LABEL_LINE = re.compile(r"(?m)^\s*(?:Image\s*\d+\s*:)?\s*<image>\s*\n?")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One picture on the page. `target`: framed as the asked-about one."""

    uri: str
    alt: str
    caption: str = ""
    target: bool = False


def text_of(content: Any) -> str:
    """The text of a string, of a message's content or of a conversation (TRL's forms), with `<image>` for a picture part."""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        if content.get("type") == "image":
            return "<image>"
        return text_of(content.get("content", content.get("text") or ""))
    if isinstance(content, Sequence):
        return "".join(text_of(part) for part in content)
    return ""


def question_of(prompt: Any) -> str:
    """The prompt without its picture placeholders and the labels that only name them."""
    several = isinstance(prompt, Sequence) and not isinstance(prompt, str) and len(prompt) > 1
    text = "\n".join(f"{turn.get('role')}: {text_of(turn)}" for turn in prompt) if several else text_of(prompt)
    return _LABEL_LINE.sub("", text).replace("<image>", "").strip()


def image_of(record: Mapping[str, Any], index: int, folder: Path) -> Image.Image | None:
    """A picture of a record whose paths are relative to `folder`; None where it cannot be read, which a report must survive."""
    try:
        return open_image(placed(record["images"][index], folder))
    except ImageError:
        return None


def is_collage(record: Mapping[str, Any]) -> bool:
    """Whether the target is a rectangle inside one picture."""
    return record.get("box") is not None


def image_side(record: Mapping[str, Any]) -> int:
    """Pixels of the longer side that a record's pictures get."""
    return 2 * SIDE if is_collage(record) else SIDE


def strip_layout(record: Mapping[str, Any]) -> tuple[int, str]:
    """Columns of the picture strip, and the largest width of one."""
    return len(record["images"]), "18rem" if is_collage(record) else "7rem"


def image_name(record: Mapping[str, Any], index: int) -> str:
    """How a picture of a record is called in words."""
    if len(record["images"]) > 1:
        return f"Image {index + 1}"
    return {"grid": "the collage", "pip": "the picture with another pasted into it"}.get(record["format"], "the picture")


def image_cells(record: Mapping[str, Any], folder: Path) -> tuple[list[Cell], int, str]:
    """A record's pictures with the target framed or outlined; then columns and width of the strip."""
    several = len(record["images"]) > 1
    cells = []
    for index in range(len(record["images"])):
        picture = image_of(record, index, folder)
        target = several and index == record.get("target")
        marked = ", the asked-about one" if target else ", the asked-about part outlined" if is_collage(record) else ""
        alt = f"{image_name(record, index)}{marked}".capitalize()
        if picture is None:
            picture, alt = Image.new("RGB", (SIDE, SIDE), (128, 128, 128)), f"{alt} (the file is missing)"
        shown = outlined(sized(picture, image_side(record)), record.get("box"))
        cells.append(Cell(uri=data_uri(shown), alt=alt, caption=f"Image {index + 1}" if several else "", target=target))
    return cells, *strip_layout(record)
