"""The prompt record: what augment writes and every later stage reads and adds to. See docs/architecture.md, Records."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeGuard

from mmdpo_trainers.data.content import IMAGE_TOKEN as IMAGE_TOKEN
from mmdpo_trainers.data.content import UnreadContent, check_columns
from mmdpo_trainers.data.conversation import TEMPLATE_COLUMNS, Stored, conversation_of
from mmdpo_trainers.data.image_paths import placed, with_paths
from mmdpo_trainers.data.recipes import is_recipe, recipe_of
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.files.json_lines import Part, read_jsonl

FORMATS = ("sequence", "grid", "pip", "single")
"""Prompt formats, in the order tables show them."""

TEXT = "text"
"""Format of a prompt without pictures: none that prompts are made in, and the last in tables."""

Moment = Literal["before", "after"]
"""The model before or after training."""


def check_placeholders(name: str, places: int, pictures: int) -> None:
    """DataError, naming the record, where a prompt has not one place, `<image>`, for each of its pictures."""
    if places != pictures:
        raise DataError(
            f"record {name}: the prompt has {places} {IMAGE_TOKEN} placeholders for {pictures} pictures; each picture needs exactly one"
        )


def prompt_record(
    *,
    id: str,
    source_id: str,
    format: str,
    images: Sequence[Any],
    prompt: Stored,
    answer: str,
    target: int | None = 0,
    num_images: int = 1,
    box: Sequence[float] | None = None,
    region: Sequence[int] | None = None,
    patch_grid: Sequence[int] | None = None,
    options: Sequence[str] | None = None,
) -> dict[str, Any]:
    """A prompt record with its keys in the file's order."""
    return {
        "id": id,
        "source_id": source_id,
        "format": format,
        "images": list(images),
        "prompt": prompt,
        "answer": answer,
        "target": target,
        "num_images": num_images,
        "box": None if box is None else [round(value, 6) for value in box],
        "region": None if region is None else list(region),
        "patch_grid": None if patch_grid is None else list(patch_grid),
        "options": None if options is None else list(options),
    }


def read_prompts(path: str | os.PathLike[str], part: Part | None = None) -> Iterator[dict[str, Any]]:
    """Yield the checked prompt records of a file, the paths in `images` absolute. Raises DataError naming record and field.

    part: of the file alone, see `line_parts`; records are counted, and ids told apart, within it.
    """
    folder = Path(path).resolve().parent
    seen: set[str] = set()
    for number, record in enumerate(read_jsonl(path, part), start=1):
        where = f"{path}, record {number} ({record.get('id')!r})"
        checked = check_prompt(record, where)
        if checked["id"] in seen:
            raise DataError(f"{where}: this id occurs twice; ids name records in all later files, so each must be its own")
        seen.add(checked["id"])
        yield {**checked, "images": [placed(image, folder) for image in checked["images"]]}


def check_prompt(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The record with its optional fields filled in. Raises DataError naming `where`, the field, what was expected and what came.

    Required: id, images, prompt, and target where there are several pictures. A missing target is never guessed. A prompt without pictures
    has an empty list of images, and no target.
    """
    expected = (("id", str, "text"), ("prompt", str | list, "text or a list of messages"), ("images", list, "a list of paths"))
    for name, kind, words in expected:
        if not isinstance(record.get(name), kind):
            raise DataError(f"{where}: {name} must be {words}, got {record.get(name)!r}")
    if (wrong := not_utf8(record)) is not None:
        raise DataError(f"{where}: {wrong}")
    try:
        check_columns(record, read=TEMPLATE_COLUMNS)
        conversation = conversation_of(record)
    except UnreadContent as error:
        raise DataError(f"{where}: {error}") from error
    images = record["images"]
    if not all((isinstance(image, str) and image) or is_recipe(image) for image in images):
        raise DataError(f"{where}: images must be a list of paths or recipes, got {images!r}")
    try:
        for image in images:
            recipe_of(image)
    except ValueError as error:
        raise DataError(f"{where}: images: {error}") from error
    found = conversation.pictures
    if found != len(images):
        raise DataError(f"{where}: the prompt has {found} {IMAGE_TOKEN} but images holds {len(images)} paths; they must be equal")
    filled = {
        "source_id": record["id"],
        "format": {0: TEXT, 1: "single"}.get(len(images), "sequence"),
        "answer": None,
        "num_images": len(images),
        "box": None,
        "region": None,
        "patch_grid": None,
        "options": None,
        **record,
        "prompt": conversation.stored(),
    }
    known = FORMATS if images else (TEXT,)
    if filled["format"] not in known:
        words = f"one of {', '.join(known)}" if images else f"{TEXT} where there are no pictures"
        raise DataError(f"{where}: format must be {words}, got {filled['format']!r}")
    _check_answer(filled, where)
    count = filled["num_images"]
    if not images:
        if count != 0 or filled.setdefault("target", None) is not None:
            raise DataError(
                f"{where}: a prompt without pictures has num_images 0 and no target, got {count!r} and {filled.get('target')!r}"
            )
        return filled
    if not _is_int(count) or count < 1:
        raise DataError(f"{where}: num_images must be a whole number from 1 up, got {count!r}")
    if filled["format"] == "sequence" and count != len(images):
        raise DataError(f"{where}: num_images must be the number of images of a sequence, {len(images)}, got {count}")
    _check_places(filled, where)
    if "target" not in filled and count == 1:
        filled["target"] = 0
    target = filled.get("target")
    if not _is_int(target) or not 0 <= target < count:
        raise DataError(f"{where}: target must be the 0-based index of the asked-about picture, below {count}, got {target!r}")
    return filled


def not_utf8(record: Any) -> str | None:
    """What is wrong with a record's text that no file can hold: JSON may escape half of a surrogate pair. None: nothing."""
    try:
        json.dumps(record, ensure_ascii=False, default=lambda value: None).encode()
    except UnicodeEncodeError as error:
        return f"the text cannot be written as UTF-8 ({error})"
    return None


def _check_answer(record: dict[str, Any], where: str) -> None:
    if not isinstance(record["answer"], str | None):
        raise DataError(f"{where}: answer must be text or null, got {record['answer']!r}")
    options = record["options"]
    if options is not None and not (isinstance(options, list) and options and all(isinstance(each, str) for each in options)):
        raise DataError(f"{where}: options must be a list of texts or null, got {options!r}")


def _check_places(record: dict[str, Any], where: str) -> None:
    box, region, grid = record["box"], record["region"], record["patch_grid"]
    if box is not None:
        numbers = _is_list(box, 4) and all(isinstance(each, int | float) and not isinstance(each, bool) for each in box)
        if not numbers or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise DataError(f"{where}: box must be [x0, y0, x1, y1] with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, got {box!r}")
    if grid is not None and not (_is_list(grid, 2) and all(_is_int(each) and each > 0 for each in grid)):
        raise DataError(f"{where}: patch_grid must be [rows, columns], whole numbers from 1 up, got {grid!r}")
    if region is None:
        return
    if grid is None:
        raise DataError(f"{where}: region needs the patch_grid that it counts patches of")
    whole = _is_list(region, 4) and all(map(_is_int, region))
    if not whole or not (0 <= region[0] < region[2] <= grid[0] and 0 <= region[1] < region[3] <= grid[1]):
        raise DataError(f"{where}: region must be [row0, col0, row1, col1], half-open, inside patch_grid {grid}, got {region!r}")


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


def relative_images(images: Sequence[Any], folder: str | os.PathLike[str], root: str | os.PathLike[str]) -> list[Any]:
    """Pictures, as paths or recipes, as a file in `folder` stores them: paths under `root` (the run folder) relative, so that a run can be
    moved; the others absolute."""
    inside = os.path.join(os.path.abspath(root), "")
    base = os.path.abspath(folder)

    def stored(path: str) -> str:
        path = os.path.abspath(path)
        return Path(os.path.relpath(path, base)).as_posix() if path.startswith(inside) else path

    return [with_paths(image, stored) for image in images]
