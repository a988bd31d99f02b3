"""The prompt record: what augment writes and every later stage reads and adds to. See docs/architecture.md, Records."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.errors import DataError
from mmdpo_trainers.run_folder import read_jsonl

FORMATS = ("sequence", "grid", "pip", "single")

IMAGE_TOKEN = "<image>"


def prompt_record(
    *,
    id: str,
    source_id: str,
    format: str,
    images: Sequence[str],
    prompt: str,
    answer: str,
    target: int = 0,
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


def read_prompts(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the checked prompt records of a file, `images` as absolute paths. Raises DataError naming record and field."""
    folder = Path(path).resolve().parent
    seen: set[str] = set()
    for number, record in enumerate(read_jsonl(path), start=1):
        where = f"{path}, record {number} ({record.get('id')!r})"
        checked = check_prompt(record, where)
        if checked["id"] in seen:
            raise DataError(f"{where}: this id occurs twice; ids name records in all later files, so each must be its own")
        seen.add(checked["id"])
        yield {**checked, "images": [os.path.normpath(folder / image) for image in checked["images"]]}


def check_prompt(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The record with its optional fields filled in. Raises DataError naming `where`, the field, what was expected and what came.

    Required: id, images, prompt, and target where there are several pictures. A missing target is never guessed.
    """
    for name, kind, words in (("id", str, "text"), ("prompt", str, "text"), ("images", list, "a list of paths")):
        if not isinstance(record.get(name), kind):
            raise DataError(f"{where}: {name} must be {words}, got {record.get(name)!r}")
    images = record["images"]
    if not images or not all(isinstance(image, str) and image for image in images):
        raise DataError(f"{where}: images must be a list of one or more paths, got {images!r}")
    if record["prompt"].count(IMAGE_TOKEN) != len(images):
        found = record["prompt"].count(IMAGE_TOKEN)
        raise DataError(f"{where}: the prompt has {found} {IMAGE_TOKEN} but images holds {len(images)} paths; they must be equal")
    filled = {
        "source_id": record["id"],
        "format": "single" if len(images) == 1 else "sequence",
        "answer": None,
        "num_images": len(images),
        "box": None,
        "region": None,
        "patch_grid": None,
        "options": None,
        **record,
    }
    if filled["format"] not in FORMATS:
        raise DataError(f"{where}: format must be one of {', '.join(FORMATS)}, got {filled['format']!r}")
    if "target" not in filled and filled["num_images"] == 1:
        filled["target"] = 0
    target = filled.get("target")
    if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < filled["num_images"]:
        raise DataError(
            f"{where}: target must be the 0-based index of the asked-about picture, below {filled['num_images']}, got {target!r}"
        )
    return filled


def relative_images(images: Sequence[str], folder: str | os.PathLike[str], root: str | os.PathLike[str]) -> list[str]:
    """Paths as a file in `folder` stores them: those under `root` (the run folder) relative, so that a run can be moved."""
    stored = []
    for image in images:
        path = Path(os.path.normpath(Path(image).absolute()))
        inside = path.is_relative_to(Path(root).absolute())
        stored.append(Path(os.path.relpath(path, Path(folder).absolute())).as_posix() if inside else str(path))
    return stored
