"""Families that need no maker of their own, by recipe."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from .recipe import Recipe, make_tiny_by_recipe
from .recipes_sized import SIZED
from .recipes_squares import SQUARES

RECIPES: dict[str, Recipe] = {**SQUARES, **SIZED}
"""By `model_type`."""

BY_RECIPE: dict[str, Callable[..., Path]] = {name: partial(make_tiny_by_recipe, recipe) for name, recipe in RECIPES.items()}
"""Family -> what writes a tiny checkpoint of it to a folder."""
