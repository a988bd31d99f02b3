"""What was measured on the GPU at hand: the folder that `MMDPO_MEASURED` names, as `make gpu` leaves it.

`tiles.json` has the tile sizes of Triton kernels, `choice_<gpu>.json` the times of backends. Either may be missing. Without the variable, and on
the CPU, the tables of the package hold.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VARIABLE = "MMDPO_MEASURED"


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What the folder holds of one GPU."""

    tiles: Sequence[Mapping[str, Any]]
    """Rows of `benchmarks.kernels.sweep_tiles`."""
    settings: Sequence[Mapping[str, Any]]
    """Of `benchmarks.kernels.choose_backends`."""
    choice_file: str
    """Where the settings are from."""


def measured_on(device: torch.device) -> Measured | None:
    """What the folder has for `device`; None: no variable is set, or the device is no GPU.

    Raises:
        ValueError: the folder has neither file, a file is not what it should be, or it was measured on another GPU.
    """
    folder = os.environ.get(VARIABLE)
    if not folder or device.type != "cuda":
        return None
    return _read(folder, torch.cuda.get_device_name(device))


@functools.lru_cache(maxsize=8)
def _read(folder: str, gpu: str) -> Measured:
    tiles, choice = Path(folder) / "tiles.json", Path(folder) / f"choice_{gpu.lower().replace(' ', '_')}.json"
    if not tiles.exists() and not choice.exists():
        others = sorted(path.name for path in Path(folder).glob("choice_*.json"))
        found = f"found only {', '.join(others)}" if others else "found neither"
        raise ValueError(
            f"{VARIABLE}={folder}: expected tiles.json or {choice.name}, as `make gpu` leaves them on this {gpu}, {found}; "
            "unset it, or run `make gpu` here"
        )
    return Measured(tiles=_rows(tiles, "rows", gpu), settings=_rows(choice, "settings", gpu), choice_file=str(choice))


def _rows(path: Path, name: str, gpu: str) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        on, rows = content["machine"]["gpu"], list(content[name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{VARIABLE}: {path}: expected what `make gpu` writes ({type(error).__name__}: {error})") from None
    if on != gpu:
        raise ValueError(f"{VARIABLE}: {path} was measured on {on}, this is {gpu}; unset the variable, or run `make gpu` here")
    return rows
