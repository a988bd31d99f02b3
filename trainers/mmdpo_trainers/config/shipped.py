"""The models that are shipped with the package."""

from __future__ import annotations

from pathlib import Path

_SHAPES = Path(__file__).resolve().parents[1] / "shapes"

SHIPPED = {"shapes": _SHAPES / "base", "shapes_prior": _SHAPES / "prior_base", "shapes_looking": _SHAPES / "looking_base"}
"""Name that a configuration gives in place of a path -> folder of the checkpoint."""
