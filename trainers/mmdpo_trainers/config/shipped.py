"""The models and configurations that are shipped with the package."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from mmdpo_trainers.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
_SHAPES = _PACKAGE / "shapes"

SHIPPED = {"shapes": _SHAPES / "base", "shapes_prior": _SHAPES / "prior_base", "shapes_looking": _SHAPES / "looking_base"}
"""Name that a configuration gives in place of a path -> folder of the checkpoint."""

CONFIGS = _PACKAGE / "configs"
"""The folder of the configurations, `accelerate` and `slurm` among them."""


def shipped_configs() -> dict[str, Path]:
    """Name of each shipped configuration -> its file."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}


def config_file(name: str | os.PathLike[str]) -> Path:
    """The file of a configuration that is given by path, or by the name of a shipped one.

    Raises ConfigError for what is neither, with the names there are, the nearest first.
    """
    path, shipped = Path(name).expanduser(), shipped_configs()
    if path.exists() and not (path.is_dir() and str(name) in shipped):
        return path
    if str(name) in shipped:
        return shipped[str(name)]
    nearest = difflib.get_close_matches(path.stem, shipped, n=len(shipped), cutoff=0)
    raise ConfigError(
        f"{name} does not exist; give a configuration file, `mmdpo init` writes one, or the name of a shipped one: {', '.join(nearest)}"
    )
