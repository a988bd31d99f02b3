"""Tiles of Triton kernels as a sweep on the GPU at hand has found them: `tiles.json` in the folder of `MMDPO_MEASURED`.

`python -m benchmarks.kernels.sweep_tiles` writes it. Without it the tables of `tree_attention_tiles` and `logit_rows_tiles` hold.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch

from ..measured import Measured, measured_on
from . import logit_rows_tiles
from .logit_rows_tiles import Block
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


def fastest_block(rows: int, device: torch.device) -> Block | None:
    """The block that was faster than the table's for bfloat16 rows of logits with their gradient; None: none was.

    rows: how many the call has; those of the sweep next to it count, by ratio.

    Raises:
        ValueError: as `measured_on`.
    """
    measured = measured_on(device)
    return None if measured is None else _fastest_block(measured, rows)


@functools.lru_cache(maxsize=1024)
def _fastest_block(measured: Measured, rows: int) -> Block | None:
    timed = [row for row in measured.tiles if "rows" in row and "milliseconds" in row]
    if not timed:
        return None
    nearest = min({row["rows"] for row in timed}, key=lambda count: abs(math.log(count / rows)))
    serving = [row for row in timed if row["rows"] == nearest and (row["in_table"] or _block(row) in logit_rows_tiles.CANDIDATES)]
    best = min(serving, key=lambda row: row["milliseconds"], default=None)
    return None if best is None or best["in_table"] else _block(best)


def _block(row: Mapping[str, Any]) -> Block:
    return Block(**{name: row[name] for name in Block._fields})


def _tiles(row: Mapping[str, Any]) -> Tiles:
    return Tiles(**{name: row[name] for name in Tiles.__dataclass_fields__})
