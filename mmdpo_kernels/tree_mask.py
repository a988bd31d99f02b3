"""What a `tree_end` row means: visibility, depth, and its cover by dense rectangles.

Query i sees key j iff `j <= i < tree_end[j]`. Everything here derives from that rule; every backend may import it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


def visible(tree_end: Tensor, window: int | None = None) -> Tensor:
    """Dense visibility, for the reference and for tests.

    Args:
        tree_end: (B, S) integer.
        window: a key is seen over at most this many tokens of its path, itself included.

    Returns:
        (B, S, S) bool; entry (b, i, j) says whether query i sees key j.
    """
    positions = torch.arange(tree_end.shape[1], device=tree_end.device)
    return visible_rows(positions.expand(tree_end.shape), tree_end, window)


def visible_rows(row_positions: Tensor, tree_end: Tensor, window: int | None = None) -> Tensor:
    """`visible` for chosen query rows only: row_positions (B, R), -1 = unused, -> (B, R, S) bool."""
    keys = torch.arange(tree_end.shape[1], device=tree_end.device)
    rows = row_positions[:, :, None]
    seen = (keys <= rows) & (rows < tree_end[:, None, :])
    if window is not None:
        depths = depth(tree_end)
        row_depth = depths.gather(1, row_positions.clamp(min=0).long())
        seen &= row_depth[:, :, None] - depths[:, None, :] < window
    return seen


def depth(tree_end: Tensor) -> Tensor:
    """Position of each token on its own path from the root, (B, S) int64; padding has no position of its own.

    It counts the visible tokens before it, so distances along a branch leave sibling branches out.
    """
    batch, length = tree_end.shape
    index = torch.arange(length, device=tree_end.device).expand(batch, length)
    counted = (tree_end > index).long()
    opened = torch.zeros(batch, length + 1, dtype=torch.long, device=tree_end.device)
    opened[:, :length] = counted
    opened.scatter_add_(1, tree_end.long().clamp(min=0, max=length), -counted)
    return opened.cumsum(1)[:, :length] - 1


class Rectangle(NamedTuple):
    """Queries [q0, q1) against keys [k0, k1): a causal square where both ranges are equal, else all pairs are seen."""

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool


class BatchPlan(NamedTuple):
    """Rectangles that cover the visible pairs of batch rows [b0, b1) exactly once."""

    b0: int
    b1: int
    rectangles: tuple[Rectangle, ...]


# A tensor -> the view of it that was planned, its version then, and the plan.
_PLANS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def rectangles(tree_end: Tensor) -> tuple[BatchPlan, ...]:
    """Cover the visible pairs of each batch row by dense rectangles.

    A run of keys with one `tree_end` is a causal square on the diagonal and, for the queries that follow in its subtree, one full
    rectangle: siblings that share a prefix share the prefix's rectangle. The plan of a tensor is kept while the tensor lives, since all
    layers of a forward ask for the same one.
    """
    if tree_end.is_inference():  # has no version to tell an edit by
        return tuple(_plan_batch(tree_end.tolist()))
    # Every layer makes a view of its own of one mask.
    owner = tree_end if tree_end._base is None else tree_end._base
    key = (tree_end._version, tree_end.shape, tree_end.stride(), tree_end.storage_offset())
    known = _PLANS.get(owner)
    if known is None or known[0] != key:
        known = (key, tuple(_plan_batch(tree_end.tolist())))
        _PLANS[owner] = known
    return known[1]


def causal_plan(batch: int, length: int) -> tuple[BatchPlan, ...]:
    """The plan of `tree_end=None`: one causal square for all rows of the batch."""
    return (BatchPlan(0, batch, (Rectangle(0, length, 0, length, True),)),)


def _plan_batch(rows: list[list[int]]) -> list[BatchPlan]:
    plans: list[BatchPlan] = []
    previous: list[int] | None = None
    for index, row in enumerate(rows):
        if row == previous:
            plans[-1] = plans[-1]._replace(b1=index + 1)
        else:
            plans.append(BatchPlan(index, index + 1, tuple(_plan_row(row))))
        previous = row
    return plans


def _plan_row(ends: list[int]) -> list[Rectangle]:
    found = []
    start = 0
    for stop in range(1, len(ends) + 1):
        # The second test keeps a padding token out of the run that ends right before it.
        if stop < len(ends) and ends[stop] == ends[start] and stop < ends[start]:
            continue
        end = min(ends[start], len(ends))
        if end > start:
            found.append(Rectangle(start, stop, start, stop, True))
            if end > stop:
                found.append(Rectangle(stop, end, start, stop, False))
        start = stop
    return found
