"""What a `tree_end` row means: visibility, depth, and its cover by dense rectangles.

Query i sees key j iff `j <= i < tree_end[j]`; where queries look ahead, iff `j < reach[i]` and `i < tree_end[j]`. Everything here derives
from that rule; every backend may import it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

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

    make: called with the tensor and the settings of the call, among which may be further tensors. What it returns must not hold the first
    tensor itself, which would then never die.
    """

    MOST = 32

    def __init__(self, make: Callable[..., Plan]) -> None:
        self._make = make
        # A tensor -> its version, and the plans made of its views at that version, with the owners of further tensors.
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __call__(self, tensor: Tensor, *settings: Hashable) -> Plan:
        further = [each for each in settings if isinstance(each, Tensor)]
        if any(each.is_inference() for each in (tensor, *further)):  # has no version to tell an edit by
            return self._make(tensor, *settings)
        owner = _owner(tensor)
        version, plans = self._known.get(owner, (None, {}))
        if version != tensor._version:
            plans = {}
            self._known[owner] = tensor._version, plans
        key = (_view(tensor), *(_view(each) if isinstance(each, Tensor) else each for each in settings))
        owners, plan = plans.get(key, ((), None))
        # A tensor that died may have left its id to another.
        if plan is None or any(known() is not _owner(each) for known, each in zip(owners, further, strict=True)):
            if key not in plans and len(plans) >= self.MOST:
                plans.pop(next(iter(plans)))
            plan = self._make(tensor, *settings)
            plans[key] = tuple(TensorWeakRef(_owner(each)) for each in further), plan
        return plan


def _owner(tensor: Tensor) -> Tensor:
    """Every layer makes a view of its own of one mask."""
    return tensor if tensor._base is None else tensor._base


def _view(tensor: Tensor) -> tuple[Hashable, ...]:
    """Which part of which tensor at which version."""
    place = (tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())
    return (id(_owner(tensor)), tensor._version, *place)


def rectangles(tree_end: Tensor | None, reach: Tensor | None = None) -> tuple[BatchPlan, ...]:
    """Cover the visible pairs of each batch row by dense rectangles; one of the two is given at least.

    A run of keys with one `tree_end` is a causal square on the diagonal and, for the queries that follow in its subtree, one full
    rectangle: siblings that share a prefix share the prefix's rectangle. With `reach`, a run's queries are taken apart where it changes: those
    that look ahead to one place, a picture's for one, are a full rectangle, and so is what others see before their own square. The plan is
    kept while its tensors live, see `PlanCache`.
    """
    if reach is not None:
        return _rectangles_with_reach(reach, tree_end)
    assert tree_end is not None
    return _rectangles(tree_end)


def causal_plan(batch: int, length: int) -> tuple[BatchPlan, ...]:
    """The plan of `tree_end=None`: one causal square for all rows of the batch."""
    return (BatchPlan(0, batch, (Rectangle(0, length, 0, length, True),)),)


def _plan_batch(tree_end: Tensor) -> tuple[BatchPlan, ...]:
    return _joined(tree_end.tolist(), _plan_row)


def _plan_batch_with_reach(reach: Tensor, tree_end: Tensor | None) -> tuple[BatchPlan, ...]:
    length = reach.shape[1]
    ends = [[length] * length] * len(reach) if tree_end is None else tree_end.tolist()
    return _joined(list(zip(ends, reach.tolist(), strict=True)), lambda row: _plan_row_with_reach(*row))


_rectangles = PlanCache(_plan_batch)
_rectangles_with_reach = PlanCache(_plan_batch_with_reach)


def _joined(rows: list[Any], plan: Callable[[Any], list[Rectangle]]) -> tuple[BatchPlan, ...]:
    """Equal rows that follow one another have one plan."""
    plans: list[BatchPlan] = []
    for index, row in enumerate(rows):
        if index and row == rows[index - 1]:
            plans[-1] = plans[-1]._replace(b1=index + 1)
        else:
            plans.append(BatchPlan(index, index + 1, tuple(plan(row))))
    return tuple(plans)


def _plan_row(ends: list[int]) -> list[Rectangle]:
    found = []
    for start, stop, end in _runs(ends):
        found.append(Rectangle(start, stop, start, stop, True))
        if end > stop:
            found.append(Rectangle(stop, end, start, stop, False))
    return found


def _plan_row_with_reach(ends: list[int], reach: list[int]) -> list[Rectangle]:
    found = []
    for start, stop, end in _runs(ends):
        for first, last, ahead in _queries_of(start, stop, reach[:end]):
            if ahead is not None:
                found.append(Rectangle(first, last, start, ahead, False))
                continue
            if first > start:
                found.append(Rectangle(first, last, start, first, False))
            found.append(Rectangle(first, last, first, last, True))
    return found


def _runs(ends: list[int]) -> Iterator[tuple[int, int, int]]:
    """Start, stop and `tree_end` of each run of keys that have one; those that nobody sees are in none."""
    start = 0
    for stop in range(1, len(ends) + 1):
        # The second test keeps a padding token out of the run that ends right before it.
        if stop < len(ends) and ends[stop] == ends[start] and stop < ends[start]:
            continue
        end = min(ends[start], len(ends))
        if end > start:
            yield start, stop, end
        start = stop


def _queries_of(start: int, stop: int, reach: list[int]) -> Iterator[tuple[int, int, int | None]]:
    """The queries that see keys of a run: first, last, and where those keys end for all of them; None: at the query itself for each."""
    ahead = torch.tensor(reach, device="cpu").clamp(max=stop)
    seeing = (ahead > start).nonzero().flatten()
    ahead = ahead[seeing]
    itself, follows = ahead == seeing + 1, seeing.diff() == 1
    level, rising = follows & (ahead.diff() == 0), follows & itself[1:] & itself[:-1]
    # A picture's last token reaches up to itself too, and belongs to the picture; the last of causal ones belongs to them.
    rising[1:] &= ~level[:-1]
    level[1:] &= ~rising[:-1]
    cuts = ((~(level | rising)).nonzero().flatten() + 1).tolist()
    queries, keys, is_level = seeing.tolist(), ahead.tolist(), level.tolist()
    for first, last in zip([0, *cuts], [*cuts, len(queries)], strict=True):
        if first < last:
            yield queries[first], queries[last - 1] + 1, keys[first] if last - first == 1 or is_level[first] else None
