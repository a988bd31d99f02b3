"""What a `tree_end` row means: visibility, depth, and its cover by dense rectangles.

Query i sees key j iff `j <= i < tree_end[j]`; where queries look ahead, iff `j < reach[i]` and `i < tree_end[j]`. Everything here derives
from that rule; every backend may import it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Plan = TypeVar("Plan")


def visible(tree_end: Tensor, window: int | None = None, reach: Tensor | None = None) -> Tensor:
    """Dense visibility, for the reference and for tests.

    Args:
        tree_end: (B, S) integer.
        window: a key is seen over at most this many tokens of its path, itself included; it does not bound what comes after the query.
        reach: (B, S) integer; query i sees no key from `reach[i]` on. None: `i + 1`.

    Returns:
        (B, S, S) bool; entry (b, i, j) says whether query i sees key j.
    """
    positions = torch.arange(tree_end.shape[1], device=tree_end.device)
    return visible_rows(positions.expand(tree_end.shape), tree_end, window, reach)


def visible_rows(row_positions: Tensor, tree_end: Tensor, window: int | None = None, reach: Tensor | None = None) -> Tensor:
    """`visible` for chosen query rows only: row_positions (B, R), -1 = unused, -> (B, R, S) bool; reach (B, S) by packed index."""
    keys = torch.arange(tree_end.shape[1], device=tree_end.device)
    rows = row_positions[:, :, None]
    used = row_positions.clamp(min=0).long()
    stop = rows + 1 if reach is None else torch.where(rows < 0, 0, reach.gather(1, used)[:, :, None])
    seen = (keys < stop) & (rows < tree_end[:, None, :])
    if window is not None:
        depths = depth(tree_end)
        row_depth = depths.gather(1, used)
        seen &= row_depth[:, :, None] - depths[:, None, :] < window
    return seen


def depth(tree_end: Tensor) -> Tensor:
    """Position of each token on its own path from the root, (B, S) int64; padding has no position of its own.

    It counts the tokens before it, so distances along a branch leave sibling branches out. A token that is hidden keeps its place where
    `tree_end` says by `-1 - end` where its node's subtree ends, as masks of transformers count it; hidden by its own index or 0, which is
    padding, it counts for none.
    """
    batch, length = tree_end.shape
    index = torch.arange(length, device=tree_end.device).expand(batch, length)
    ends = torch.where(tree_end < 0, -1 - tree_end, tree_end).long()
    counted = (ends > index).long()
    opened = torch.zeros(batch, length + 1, dtype=torch.long, device=tree_end.device)
    opened[:, :length] = counted
    opened.scatter_add_(1, ends.clamp(max=length), -counted)
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


class PlanCache(Generic[Plan]):
    """Plans made from tensors, kept while their tensor lives and is not edited: all layers of a forward ask for the same ones.

    Of one tensor the last `MOST` are kept, since it may be a whole data set of which each batch is a view.

    make: called with the tensor and the settings of the call. What it returns must not hold the tensor itself, which would then never die.
    """

    MOST = 32

    def __init__(self, make: Callable[..., Plan]) -> None:
        self._make = make
        # A tensor -> its version, and the plans made of its views at that version.
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __call__(self, tensor: Tensor, *settings: Hashable) -> Plan:
        if tensor.is_inference():  # has no version to tell an edit by
            return self._make(tensor, *settings)
        # Every layer makes a view of its own of one mask.
        owner = tensor if tensor._base is None else tensor._base
        version, plans = self._known.get(owner, (None, {}))
        if version != tensor._version:
            plans = {}
            self._known[owner] = tensor._version, plans
        key: tuple[Any, ...] = (tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), *settings)
        plan = plans.get(key)
        if plan is None:
            if len(plans) >= self.MOST:
                plans.pop(next(iter(plans)))
            plan = plans[key] = self._make(tensor, *settings)
        return plan


def rectangles(tree_end: Tensor) -> tuple[BatchPlan, ...]:
    """Cover the visible pairs of each batch row by dense rectangles.

    A run of keys with one `tree_end` is a causal square on the diagonal and, for the queries that follow in its subtree, one full
    rectangle: siblings that share a prefix share the prefix's rectangle. The plan of a tensor is kept, see `PlanCache`.
    """
    return _rectangles(tree_end)


def causal_plan(batch: int, length: int) -> tuple[BatchPlan, ...]:
    """The plan of `tree_end=None`: one causal square for all rows of the batch."""
    return (BatchPlan(0, batch, (Rectangle(0, length, 0, length, True),)),)


def _plan_batch(tree_end: Tensor) -> tuple[BatchPlan, ...]:
    plans: list[BatchPlan] = []
    previous: list[int] | None = None
    for index, row in enumerate(tree_end.tolist()):
        if row == previous:
            plans[-1] = plans[-1]._replace(b1=index + 1)
        else:
            plans.append(BatchPlan(index, index + 1, tuple(_plan_row(row))))
        previous = row
    return tuple(plans)


_rectangles = PlanCache(_plan_batch)


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
