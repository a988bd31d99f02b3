"""Which (query block, key block) pairs of a token tree a kernel visits, found on the device by a few PyTorch calls, without waiting."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...tree_mask import PlanCache, depth

MIXED = -2
"""Kind of a key block whose keys are not all of one segment."""


def query_plan(
    tree_end: Tensor | None,
    like: Tensor,
    window: int | None,
    block_m: int,
    block_n: int,
    reach: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """Key blocks that each query block visits: up to the largest reach of its queries, and none that the tree hides from all of them.

    Args:
        tree_end: (B, S) integer, None = causal.
        like: (B, H, S, D), whose batch, length and device the plan serves.
        window: see `tree_mask.visible`.
        reach: (B, S) integer by query, None = no query looks ahead.
        segments: (B, S) integer, None = no masses. Key blocks of several segments then come with those that need a mask.

    Returns:
        (B, cdiv(S, block_m), 2 + cdiv(S, block_n)) int32: the number of key blocks all of whose keys are seen by all queries of the block,
        the number of key blocks with any visible pair, then those key blocks, the fully visible ones first. Hidden ones fill the rest.
    """
    if segments is not None:
        return _mass_plans(segments, tree_end, reach, window, block_m, block_n)
    return _plan_of(tree_end, reach, like, window, block_m, block_n, False)


def key_plan(
    tree_end: Tensor | None, like: Tensor, window: int | None, block_m: int, block_n: int, reach: Tensor | None = None
) -> Tensor:
    """Query blocks that visit each key block, as `query_plan`: (B, cdiv(S, block_n), 2 + cdiv(S, block_m)) int32.

    They begin with the first that holds a query whose reach covers a key of the block, be it before the block. A query block that extends
    beyond S never counts as fully visible here: its missing rows have to be masked.
    """
    return _plan_of(tree_end, reach, like, window, block_m, block_n, True)


def segment_kinds(segments: Tensor, block_n: int) -> Tensor:
    """(B, cdiv(S, block_n)) int32: the segment of all keys of a block (-1 = none), or MIXED."""
    return _kinds(segments, block_n)


def token_depths(tree_end: Tensor) -> Tensor:
    """`tree_mask.depth` as (B, S) int32."""
    return _depths(tree_end)


def _plan_of(
    tree_end: Tensor | None, reach: Tensor | None, like: Tensor, window: int | None, block_m: int, block_n: int, by_key: bool
) -> Tensor:
    if tree_end is not None:
        return _plans(tree_end, reach, window, block_m, block_n, by_key)
    if reach is not None:
        return _rootless_plans(reach, window, block_m, block_n, by_key)
    return _causal_plan(like.shape[2], like.device, window, block_m, block_n, by_key).expand(like.shape[0], -1, -1)


def _plan(
    tree_end: Tensor,
    reach: Tensor | None,
    window: int | None,
    block_m: int,
    block_n: int,
    by_key: bool,
    apart: Tensor | None = None,
) -> Tensor:
    """apart: (B, N) bool, key blocks that do not count as fully visible."""
    length = tree_end.shape[1]
    first_query, last_query = _block_edges(length, block_m, tree_end.device)  # (M,)
    first_key, last_key = _block_edges(length, block_n, tree_end.device)  # (N,)
    # The last key within reach of any query of a block, and of all.
    if reach is None:
        most_last, least_last = last_query.clamp(max=length - 1), first_query
        index = torch.arange(length, device=tree_end.device)
        tree_end = tree_end.where(tree_end > index, 0)  # padding is seen by nobody
    else:
        least_last, most_last = (edge - 1 for edge in _block_range(reach.clamp(max=length), block_m))  # (B, M)
    least_end, most_end = _block_range(tree_end, block_n)  # (B, N)
    # (B, M, N). A key block that extends beyond S is never wholly within reach of a query.
    seen = (first_key <= most_last[..., None]) & (most_end[:, None, :] > first_query[:, None])
    full = (last_key <= least_last[..., None]) & (least_end[:, None, :] > last_query.clamp(max=length - 1)[:, None])
    if window is not None:
        depths = depth(tree_end)
        least_query, most_query = (edge[:, :, None] for edge in _block_range(depths, block_m))
        least_key, most_key = (edge[:, None, :] for edge in _block_range(depths, block_n))
        seen &= least_query - most_key < window
        full &= most_query - least_key < window
    full &= seen
    if apart is not None:
        full &= ~apart[:, None]
    if by_key:
        full &= (last_query < length)[:, None]
        seen, full = seen.mT, full.mT
    order = (seen.to(torch.int32) + full.to(torch.int32)).argsort(dim=-1, descending=True, stable=True)
    counts = torch.stack((full.sum(-1), seen.sum(-1)), dim=-1)
    return torch.cat((counts, order), dim=-1).to(torch.int32)


def _rootless_plan(reach: Tensor, *settings: Any) -> Tensor:
    return _plan(torch.full_like(reach, reach.shape[1]), reach, *settings)


def _mass_plan(
    segments: Tensor, tree_end: Tensor | None, reach: Tensor | None, window: int | None, block_m: int, block_n: int
) -> Tensor:
    if tree_end is None:
        tree_end = torch.full_like(segments, segments.shape[1])
    return _plan(tree_end, reach, window, block_m, block_n, False, _find_kinds(segments, block_n) == MIXED)


def _find_depths(tree_end: Tensor) -> Tensor:
    return depth(tree_end).to(torch.int32)


def _find_kinds(segments: Tensor, block_n: int) -> Tensor:
    least, most = _block_range(segments, block_n)
    return torch.where(least == most, least, MIXED).to(torch.int32)


# Every layer of a forward asks for the same ones.
_plans = PlanCache(_plan)
_rootless_plans = PlanCache(_rootless_plan)
_mass_plans = PlanCache(_mass_plan)
_depths = PlanCache(_find_depths)
_kinds = PlanCache(_find_kinds)


@functools.lru_cache(maxsize=32)
def _causal_plan(length: int, device: torch.device, window: int | None, block_m: int, block_n: int, by_key: bool) -> Tensor:
    return _plan(torch.full((1, length), length, dtype=torch.int32, device=device), None, window, block_m, block_n, by_key)


def _block_edges(length: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First and last index of each block, the last block whole."""
    first = torch.arange(0, length, block, device=device)
    return first, first + block - 1


def _block_range(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(B, S) -> least and most value in each block, (B, cdiv(S, block)) each."""
    length = values.shape[1]
    # The last entry again where a block reaches beyond S: it changes neither.
    index = torch.arange(length + -length % block, device=values.device).clamp(max=length - 1)
    least, most = values[:, index].unflatten(1, (-1, block)).aminmax(dim=-1)
    return least, most
