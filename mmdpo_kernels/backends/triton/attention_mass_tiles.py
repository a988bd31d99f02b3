"""Tile sizes of the attention-mass kernels: by work, element size, head dim and GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """How a program cuts its work."""

    block_m: int
    """Packed rows."""
    block_n: int
    """Keys."""
    step_d: int
    """Elements of a head vector read at a time."""
    num_warps: int
    num_stages: int


def tile_of(work: str, dtype: torch.dtype, block_d: int, target: int) -> Tile:
    """Chosen so that no form spills registers on sm_80, sm_90 and sm_100, see `ahead_of_time`, and none but sm_90's takes over 99 KiB shared.

    Args:
        target: compute capability, 80 for 8.0.
        work: "scores" (probabilities only), "corrections" (with upstream gradients), "query" and "key" (a gradient of whole head vectors).
    """
    if dtype == torch.float32:  # outside the tensor cores, from registers
        block = 32 if work in ("scores", "corrections") else 16
        return Tile(block, 16, min(block_d, 32), 4 if block_d <= 512 else 8, 1)
    if block_d > 256:
        large = {"scores": Tile(64, 64, 128, 4, 2), "corrections": Tile(64, 32, 128, 4, 2)}
        return large.get(work, Tile(16, 16, 64, 8, 1))
    if block_d > 128:
        return {
            "scores": Tile(64, 64 if target == 90 else 32, block_d, 8, 2),
            "corrections": Tile(64, 32, block_d, 8, 2),
            "query": Tile(32, 32, block_d, 8, 1),
            "key": Tile(16, 32, block_d, 8, 1),
        }[work]
    return {
        "scores": Tile(64, 64 if target == 90 else 32, block_d, 4, 3),
        "corrections": Tile(64, 32, block_d, 4, 3),
        "query": Tile(64, 32, block_d, 8, 2),
        "key": Tile(32, 64, block_d, 8, 2) if block_d == 128 else Tile(64, 32, block_d, 8, 2),
    }[work]
