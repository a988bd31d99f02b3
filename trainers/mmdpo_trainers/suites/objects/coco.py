"""COCO's annotations as what is in each picture: kinds of object, by instance annotations and captions."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdpo_trainers.errors import DataError
from mmdpo_trainers.suites.objects.chair import Kinds, truth_of

_FOLDERS = ("", "annotations")
_SYNONYMS = ("synonyms.txt", "synonyms_refine.txt")


def annotation_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Instances and captions of a folder, or of its `annotations/`. Raises DataError where either is missing."""
    found = [
        sorted(file for place in _FOLDERS for file in (folder / place).glob(f"{kind}_*.json"))
        for kind in ("instances", "captions")
    ]
    if not all(found):
        raise DataError(
            f"{folder} lacks COCO's annotations: expected annotations/instances_val2014.json and captions_val2014.json, or those of another "
            "year; both are needed to know what is in a picture"
        )
    return found[0], found[1]


def synonyms_file(folder: Path) -> Path | None:
    """CHAIR's list of synonyms, where the user has it in the folder, its `annotations/` or its `data/`."""
    files = (folder / place / name for place in (*_FOLDERS, "data") for name in _SYNONYMS)
    return next((file for file in files if file.is_file()), None)


def kinds_of(folder: Path) -> Kinds:
    """Words for kinds of object: CHAIR's synonyms where the user has them, else COCO's names."""
    file = synonyms_file(folder)
    return Kinds.of_coco() if file is None else Kinds.read(file)


def images_of(folder: Path) -> Iterator[Mapping[str, Any]]:
    """COCO's entries of pictures (`id`, `file_name`), of all instance files."""
    for file in annotation_files(folder)[0]:
        yield from entries(file, "images")


@dataclass(frozen=True)
class Annotations:
    """What is known of each picture, by its id."""

    kinds: Kinds
    categories: Mapping[str, set[str]]
    captions: Mapping[str, list[str]]

    @classmethod
    def read(cls, folder: Path) -> Annotations:
        """All of a folder's. Raises DataError where they lack, or cannot be read."""
        categories: dict[str, set[str]] = {}
        captions: dict[str, list[str]] = {}
        instances, texts = annotation_files(folder)
        for file in instances:
            names = {entry["id"]: str(entry["name"]) for entry in entries(file, "categories")}
            for entry in entries(file, "annotations"):
                categories.setdefault(str(entry["image_id"]), set()).add(names[entry["category_id"]])
        for file in texts:
            for entry in entries(file, "annotations"):
                captions.setdefault(str(entry["image_id"]), []).append(str(entry["caption"]))
        return cls(kinds_of(folder), categories, captions)

    def truth(self, image: str) -> list[str] | None:
        """The kinds of object in a picture, sorted; None of a picture without annotation and caption."""
        if image not in self.categories and image not in self.captions:
            return None
        return truth_of(self.kinds, self.categories.get(image, ()), self.captions.get(image, ()))


@functools.lru_cache(maxsize=1)
def annotations_of(folder: Path) -> Annotations:
    """The annotations of a folder, read once."""
    return Annotations.read(folder)


def entries(file: Path, name: str) -> Iterator[Mapping[str, Any]]:
    """The objects of one list of a JSON object, one at a time: whole annotations take ten times their file in memory.

    Raises DataError where there is no such list, or it cannot be read.
    """
    decoder, text = json.JSONDecoder(), file.read_text(encoding="utf-8")
    start = re.search(rf'"{name}"\s*:\s*\[\s*', text)
    if start is None:
        raise DataError(f"{file}: expected a list {name!r}, as COCO's annotations have it; get the file anew")
    place = start.end()
    try:
        while text[place] != "]":
            entry, place = decoder.raw_decode(text, place)
            yield entry
            place = re.compile(r"\s*,?\s*").match(text, place).end()  # type: ignore[union-attr]
    except (ValueError, IndexError) as error:
        raise DataError(f"{file}: the list {name!r} is not valid JSON ({error}); get the file anew") from error
