"""Pictures that are made of other pictures, as recipes: a collage or a picture in a picture is kept as what it is made of.

A recipe stands in a record's `images` where a path would, and is drawn where pictures are opened (`data/images.py`), each time the same
pixels. As JSON, the paths relative to the file's folder like all others:

    {"recipe": "grid", "images": ["a.jpg", "b.jpg"], "sha256": ["…", "…"], "cell_size": 448, "margin": 40, "label": true, "square": true}
    {"recipe": "pip", "images": ["host.jpg", "pasted.jpg"], "sha256": ["…", "…"], "max_fraction": 0.7, "square": true}

`sha256`, which may be left out, are the first 16 digits of the files' SHA-256: a file that has changed since is refused, and what the recipe
makes is known by its content without being drawn. Nothing here opens a file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import PIL
from PIL import Image

from mmdpo_trainers.data.compose import Size, collage_boxes, collage_size, grid_collage, pic_in_pic, pic_in_pic_place

LAYOUTS: Mapping[str, tuple[tuple[str, type], ...]] = {
    "grid": (("cell_size", int), ("margin", int), ("label", bool), ("square", bool)),
    "pip": (("max_fraction", float), ("square", bool)),
}
"""What is said of how a recipe's pictures are laid out, and of which kind it is."""

MARK_DIGITS = 16
"""Digits of a file's SHA-256 that a recipe has."""
_DRAWING = 1
"""To be raised when `data/compose.py` draws other pixels: what a recipe makes then has another key."""


@dataclass(frozen=True)
class Recipe:
    """A picture made of others. Raises ValueError naming what does not fit."""

    kind: str
    """`grid` or `pip`, see `grid_collage` and `pic_in_pic`."""
    images: tuple[str, ...]
    """Paths, in reading order; of `pip` the host and what is pasted into it."""
    layout: Mapping[str, Any]
    """The arguments of `LAYOUTS`."""
    marks: tuple[str, ...] | None = None
    """Of each file the beginning of its SHA-256."""

    def __post_init__(self) -> None:
        if self.kind not in LAYOUTS:
            raise ValueError(f"recipe: expected {' or '.join(LAYOUTS)}, got {self.kind!r}")
        if not self.images or not all(isinstance(path, str) and path for path in self.images):
            raise ValueError(f"recipe {self.kind}: images must be paths, got {list(self.images)!r}")
        if self.kind == "pip" and len(self.images) != 2:
            raise ValueError(f"recipe pip: images must be two, the host and what is pasted into it, got {len(self.images)}")
        known = dict(LAYOUTS[self.kind])
        wrong = next((name for name in self.layout if name not in known), None)
        if wrong is not None:
            raise ValueError(f"recipe {self.kind}: unknown {wrong!r}; expected images, sha256, {', '.join(known)}")
        for name, kind in known.items():
            value = self.layout.get(name)
            if not isinstance(value, int | float if kind is float else kind) or (kind is not bool and isinstance(value, bool)):
                raise ValueError(f"recipe {self.kind}: {name} must be {kind.__name__}, got {value!r}")
        marks = self.marks
        if marks is not None and (len(marks) != len(self.images) or not all(map(_is_mark, marks))):
            raise ValueError(
                f"recipe {self.kind}: sha256 must be {MARK_DIGITS} hexadecimal digits for each of its {len(self.images)} images, got "
                f"{list(marks)!r}"
            )
        if self.kind == "grid":
            collage_size(len(self.images), **self.layout)
        elif not 0 < self.layout["max_fraction"] <= 1:
            raise ValueError(f"recipe pip: expected 0 < max_fraction <= 1, got {self.layout['max_fraction']}")

    def stored(self) -> dict[str, Any]:
        """As records have it."""
        marks = {} if self.marks is None else {"sha256": list(self.marks)}
        return {"recipe": self.kind, "images": list(self.images), **marks, **self.layout}

    def at(self, place: Callable[[str], str]) -> Recipe:
        """The same of paths elsewhere."""
        return replace(self, images=tuple(map(place, self.images)))

    def key(self, contents: Sequence[str]) -> str:
        """SHA-256 that tells the picture it makes from all others. contents: keys of what its images hold.

        The same wherever the files are. Pillow's version is a part, as it scales and decodes.
        """
        told = [_DRAWING, PIL.__version__, self.kind, list(contents), [self.layout[name] for name, _ in LAYOUTS[self.kind]]]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def size(self, size_of: Callable[[str], Size]) -> Size:
        """Width and height in pixels of what it makes. size_of: those of an image of its own; few are asked for."""
        if self.kind == "grid":
            return collage_size(len(self.images), **self.layout)
        host = size_of(self.images[0])
        return (max(host), max(host)) if self.layout["square"] else host

    def box(self, index: int, sizes: Sequence[Size]) -> tuple[float, float, float, float]:
        """Where image `index` is, as `(x0, y0, x1, y1)` in fractions: its cell in a grid. sizes: of all images, in pixels."""
        if self.kind == "grid":
            return collage_boxes(len(self.images), **self.layout)[index]
        return pic_in_pic_place(sizes[0], sizes[1], **self.layout)[2]

    def draw(self, pictures: Sequence[Image.Image]) -> Image.Image:
        """The picture, of upright RGB ones in the order of `images`."""
        if self.kind == "grid":
            return grid_collage(pictures, **self.layout)[0]
        return pic_in_pic(*pictures, **self.layout)[0]


def recipe_of(value: Any) -> Recipe | None:
    """The recipe that a picture of a record is; None: it is no recipe. Raises ValueError naming what is wrong with it."""
    if not is_recipe(value):
        return None
    # Columns of a dataset have null where another record has something.
    given = {name: each for name, each in value.items() if each is not None}
    images, marks = given.pop("images", ()), given.pop("sha256", None)
    kind = given.pop("recipe")
    for name, each in (("images", images), ("sha256", marks or ())):
        if isinstance(each, str) or not isinstance(each, Sequence):
            raise ValueError(f"recipe {kind!r}: {name} must be a list, got {each!r}")
    given = {name: each for name, each in given.items() if name not in ("path", "bytes")}
    return Recipe(str(kind), tuple(images), given, None if marks is None else tuple(marks))


def is_recipe(value: Any) -> bool:
    """Whether a picture of a record is given as a recipe."""
    return isinstance(value, Mapping) and value.get("recipe") is not None


def _is_mark(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(rf"[0-9a-f]{{{MARK_DIGITS}}}", value) is not None
