"""Random token trees and the accuracy rule, shared by the kernel tests."""

from __future__ import annotations

import random

import torch
from torch import Tensor


def random_tree_end(batch: int, length: int, seed: int, *, padding: bool = True) -> Tensor:
    """(B, S) int32: random nested nodes, several roots, padding at the end of some rows."""
    rng = random.Random(seed)
    rows = []
    for _ in range(batch):
        pad = rng.choice([0, 0, rng.randrange(length)]) if padding else 0
        ends = list(range(length))
        _fill(ends, 0, length - pad, rng)
        rows.append(ends)
    return torch.tensor(rows, dtype=torch.int32)


def _fill(ends: list[int], start: int, stop: int, rng: random.Random) -> None:
    while start < stop:
        end = rng.randint(start + 1, stop)
        own = rng.randint(start + 1, end)
        ends[start:own] = [end] * (own - start)
        _fill(ends, own, end, rng)
        start = end


def assert_accurate(ours: Tensor, torch_same_dtype: Tensor, truth: Tensor) -> None:
    """Elementwise `|truth - ours| <= 2 |truth - torch| + one rounding step`, truth in float64.

    The step is that of the largest entry: an entry near zero is a sum of terms of that size, and plain PyTorch may hit it by luck.
    """
    assert not ours.isnan().any()
    step = torch.finfo(torch_same_dtype.dtype).eps * truth.abs().max()
    excess = (truth - ours.double()).abs() - 2 * (truth - torch_same_dtype.double()).abs() - step
    assert excess.max().item() <= 0, f"error exceeds the rule by {excess.max().item():.3e}"
