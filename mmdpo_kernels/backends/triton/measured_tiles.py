"""Tiles of Triton kernels as a sweep on the GPU at hand has found them: `tiles.json` in the folder of `MMDPO_MEASURED`.

`python -m benchmarks.kernels.sweep_tiles` writes it. Without it the tables of `tree_attention_tiles` hold.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from ..measured import Measured, measured_on
from .tree_attention_tiles import CANDIDATES, Tiles


def fastest(call: str, device: torch.device) -> Mapping[str, Tiles]:
    """By pass the tiles that were faster than the table's, of those that serve such calls: "causal", "tree" or "tree mass".

    Raises:
        ValueError: as `measured_on`.
    """
    measured = measured_on(device)
    return {} if measured is None else _fastest(measured, call)


@functools.lru_cache(maxsize=16)
def _fastest(measured: Measured, call: str) -> dict[str, Tiles]:
    found: dict[str, Tiles] = {}
    for name, candidates in CANDIDATES.items():
        timed = [row for row in measured.tiles if row["pass"] == name and "milliseconds" in row]
        serving = [row for row in timed if row["in_table"] or call in candidates.get(_tiles(row), ())]
        best = min(serving, key=lambda row: row["milliseconds"], default=None)
        if best is not None and not best["in_table"]:
            found[name] = _tiles(best)
    return found


def _tiles(row: Mapping[str, Any]) -> Tiles:
    return Tiles(**{name: row[name] for name in Tiles.__dataclass_fields__})
