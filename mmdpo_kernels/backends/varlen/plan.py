"""A tree as sequences of one variable-length attention call.

Cut each batch row's queries wherever a node ends: between two cuts every query sees the keys that are open at its beginning, then the
run's own keys up to itself. That is bottom-right causal attention of the run over its path from the root, so a run is a sequence of its
own, and only its keys and values are repeated: a prompt with two responses becomes (prompt, response) and (response over its path).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...tree_mask import PlanCache


class Call(NamedTuple):
    """One variable-length call. Tokens are numbered b * S + s over the batch."""

    causal: bool
    """Bottom-right causal; else every query of a sequence sees all its keys."""
    rows: Tensor | None
    """(Tq,) int64: the token of each query, none twice; None: all tokens in order."""
    keys: Tensor | None
    """(Tk,) int64: the token of each key; None: all tokens in order."""
    query_starts: Tensor
    """(N + 1,) int32: where each sequence's queries start, Tq at the end."""
    key_starts: Tensor
    """(N + 1,) int32: the same for keys."""
    max_queries: int
    max_keys: int
    copies: tuple[tuple[Tensor, Tensor], ...]
    """What sums repeated keys up again in a fixed order: the n-th copy of every token that has one, as (entries of `keys`, tokens)."""


def plan(tree_end: Tensor | None, batch: int, length: int, window: int | None, device: torch.device) -> tuple[Call, ...]:
    """The calls for a tree, kept while its tensor lives; together they hold each query that sees a key exactly once."""
    if tree_end is not None:
        return _plans(tree_end, window)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    return (Call(True, None, None, starts, starts, length, length, ()),)


class _Run(NamedTuple):
    """Queries that are consecutive tokens, and the tokens they see."""

    queries: np.ndarray
    keys: np.ndarray
    causal: bool


def _make(tree_end: Tensor, window: int | None) -> tuple[Call, ...]:
    ends = tree_end.cpu().numpy().astype(np.int64)
    length = ends.shape[1]
    runs = [run for row, its_ends in enumerate(ends) for run in _runs(its_ends, row * length, window)]
    # A token that nobody sees, itself included, sees its whole path: the second call is for such tokens and rarely there.
    kinds = ([run for run in runs if run.causal is causal] for causal in (True, False))
    return tuple(_call(kind, ends.size, tree_end.device) for kind in kinds if kind)


def _runs(ends: np.ndarray, offset: int, window: int | None) -> Iterator[_Run]:
    """The runs of one batch row, whose tokens are numbered from `offset`; runs that see nothing are left out."""
    tokens = np.arange(len(ends))
    seen = ends > tokens
    cut = np.zeros(len(ends) + 1, dtype=bool)
    cut[np.minimum(ends[seen], len(ends))] = True
    cut[1:-1] |= seen[1:] != seen[:-1]
    cut[[0, -1]] = True
    edges = np.flatnonzero(cut).tolist()
    for start, stop in zip(edges, edges[1:], strict=False):
        path = np.flatnonzero(ends[:start] > start)
        if window is not None and (ends[: start + 1] < -1 - start).any():
            # A window counts hidden tokens, which the kernel is not given: each query by itself, with the keys that it sees.
            on_path = np.flatnonzero((ends[:start] > start) | (ends[:start] < -1 - start))
            for query in range(start, stop):
                near = np.concatenate([on_path, tokens[start : query + 1]])[-window:]
                keys = near[ends[near] > query]
                if keys.size:
                    yield _Run(offset + tokens[query : query + 1], offset + keys, False)
        elif seen[start]:
            yield _Run(offset + tokens[start:stop], offset + np.concatenate([path, tokens[start:stop]]), True)
        elif path.size:
            yield _Run(offset + tokens[start:stop], offset + path[-window if window else 0 :], False)


def _call(runs: list[_Run], num_tokens: int, device: torch.device) -> Call:
    rows, keys = np.concatenate([run.queries for run in runs]), np.concatenate([run.keys for run in runs])
    num_queries, num_keys = [len(run.queries) for run in runs], [len(run.keys) for run in runs]
    in_order = np.array_equal(keys, np.arange(num_tokens))

    def on_device(array: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(array).to(device, dtype)

    return Call(
        causal=runs[0].causal,
        rows=None if len(rows) == num_tokens else on_device(rows),
        keys=None if in_order else on_device(keys),
        query_starts=on_device(_starts(num_queries), torch.int32),
        key_starts=on_device(_starts(num_keys), torch.int32),
        max_queries=max(num_queries),
        max_keys=max(num_keys),
        copies=tuple((on_device(which), on_device(keys[which])) for which in ([] if in_order else _copies(keys))),
    )


def _starts(sizes: Iterable[int]) -> np.ndarray:
    return np.cumsum([0, *sizes])


def _copies(keys: np.ndarray) -> Iterator[np.ndarray]:
    """Entries of `keys` that are the first of their value, then those that are the second, …"""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    position = np.arange(len(keys))
    number = position - np.maximum.accumulate(np.where(first, position, 0))
    for n in range(int(number.max()) + 1):
        yield np.sort(order[number == n])


_plans = PlanCache(_make)
