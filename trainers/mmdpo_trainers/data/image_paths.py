"""The files that pictures of records are in: which they are, and their paths from one folder to another."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from mmdpo_trainers.data.images import PathLike, open_image, recipe_in


def render(recipe: Mapping[str, Any], *, folder: PathLike = ".") -> Image.Image:
    """The picture that a recipe of a record makes, upright and in RGB. folder: that of the record's file, which paths are relative to.

    Raises ImageError where one of its pictures is not what it was, or cannot be read.
    """
    return open_image(placed(recipe, folder))


def image_files(image: Any) -> list[str]:
    """The files that a picture of a record is read from: one, those of a recipe, or none."""
    if (recipe := recipe_in(image)) is not None:
        return list(recipe.images)
    if isinstance(image, Mapping):
        image = None if image.get("bytes") else image.get("path")
    if not isinstance(image, str | os.PathLike) or os.fspath(image).startswith("data:"):
        return []
    return [os.fspath(image)]


def placed(image: Any, folder: PathLike) -> Any:
    """A picture of a record, a path or a recipe, whose paths are relative to `folder`, with absolute ones; any other as it is."""
    return with_paths(image, lambda path: os.path.normpath(os.path.join(folder, path)))


def with_paths(image: Any, place: Callable[[str], str]) -> Any:
    """A picture of a record with `place` of its path, or of each of its recipe's; any other as it is."""
    if (recipe := recipe_in(image)) is not None:
        return recipe.at(place).stored()
    if not isinstance(image, str | os.PathLike) or os.fspath(image).startswith("data:"):
        return image
    return place(os.fspath(image))
