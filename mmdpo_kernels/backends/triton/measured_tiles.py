"""Tiles of tree attention as a sweep on the GPU at hand has found them: the file that `MMDPO_TRITON_TILES` names.

`python -m benchmarks.kernels.sweep_tiles` writes it. Without the variable the tables of `tree_attention_tiles` hold.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch

from .tree_attention_tiles import CANDIDATES, Tiles

VARIABLE = "MMDPO_TRITON_TILES"


def fastest(call: str | None, device: torch.device) -> dict[str, Tiles]:
    """By pass the tiles that were faster than the table's, of those that serve such calls: "causal", "tree" or "tree mass"; None: none do.

    Raises:
        ValueError: the file is not there, is no sweep's, or is of another GPU than `device`.
    """
    path = os.environ.get(VARIABLE)
    if not path or call is None or device.type != "cuda":
        return {}
    return _fastest(path, call, torch.cuda.get_device_name(device))


@functools.lru_cache(maxsize=16)
def _fastest(path: str, call: str, gpu: str) -> dict[str, Tiles]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        measured, rows = content["machine"]["gpu"], content["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{VARIABLE}={path}: expected what benchmarks.kernels.sweep_tiles writes ({type(error).__name__}: {error})"
        ) from None
    if measured != gpu:
        raise ValueError(f"{VARIABLE}={path}: it was measured on {measured}, this is {gpu}; unset it, or make the file here")
    found: dict[str, Tiles] = {}
    for name, candidates in CANDIDATES.items():
        timed = [row for row in rows if row["pass"] == name and "milliseconds" in row]
        serving = [row for row in timed if row["in_table"] or call in candidates.get(_tiles(row), ())]
        best = min(serving, key=lambda row: row["milliseconds"], default=None)
        if best is not None and not best["in_table"]:
            found[name] = _tiles(best)
    return found


def _tiles(row: dict[str, Any]) -> Tiles:
    return Tiles(**{name: row[name] for name in Tiles.__dataclass_fields__})
