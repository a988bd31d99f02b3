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


LOOKING_AHEAD = ("pictures", "a picture first", "prefix", "nothing")


def with_reach(tree_end: Tensor, seed: int, *, kind: str | None = None) -> tuple[Tensor, Tensor]:
    """A tree, with tokens that nobody sees at 0, and a `reach` for it, (B, S) each: spans inside nodes whose tokens see one another.

    kind: "pictures", of any length and maybe next to one another; one at each node's beginning, as where branches differ in it; the whole
    of each root, as in a prefix-LM; or "nothing", `i + 1` throughout. None: one by chance.
    """
    rng = random.Random(seed)
    index = torch.arange(tree_end.shape[1])
    tree_end = torch.where(tree_end > index, tree_end, 0)
    reach = (index + 1).repeat(tree_end.shape[0], 1)
    for row, ends in zip(reach, tree_end.tolist(), strict=True):
        its_kind = rng.choice(LOOKING_AHEAD) if kind is None else kind
        for start, stop, is_root in _nodes(ends):
            for first, last in _spans(start, stop, its_kind, is_root, rng):
                row[first:last] = last
    return tree_end.to(torch.int32), reach.to(torch.int32)


def _nodes(ends: list[int]) -> list[tuple[int, int, bool]]:
    """First token, end, and whether it is a root, of runs of tokens with one end; tokens that nobody sees belong to the run they are in."""
    found: list[tuple[int, int, bool]] = []
    end = covered = 0
    for token, its_end in enumerate(ends):
        if found and (its_end == 0 or (its_end == end and token < end)):
            found[-1] = (found[-1][0], token + 1, found[-1][2])
        elif its_end:
            found.append((token, token + 1, token >= covered))
            end, covered = its_end, max(covered, its_end)
    return found


def _spans(start: int, stop: int, kind: str, is_root: bool, rng: random.Random) -> list[tuple[int, int]]:
    if kind == "prefix":
        return [(start, stop)] if is_root else []
    if kind == "a picture first":
        return [(start, rng.randint(start + 1, stop))]
    cuts = sorted(rng.randint(start, stop) for _ in range(rng.randint(2, 6))) if kind == "pictures" else []
    return [(first, last) for first, last in zip(cuts, cuts[1:], strict=False) if first < last and rng.random() < 0.7]


def assert_accurate(ours: Tensor, torch_same_dtype: Tensor, truth: Tensor) -> None:
    """Elementwise `|truth - ours| <= 2 |truth - torch| + one rounding step`, truth in float64.

    The step is that of the largest entry: an entry near zero is a sum of terms of that size, and plain PyTorch may hit it by luck.
    """
    assert not ours.isnan().any()
    step = torch.finfo(torch_same_dtype.dtype).eps * truth.abs().max()
    excess = (truth - ours.double()).abs() - 2 * (truth - torch_same_dtype.double()).abs() - step
    assert excess.max().item() <= 0, f"error exceeds the rule by {excess.max().item():.3e}"
