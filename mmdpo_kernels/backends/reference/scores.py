"""Pieces that the reference attention ops share: scores, head groups, segments."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import accumulation_dtype


def expand_heads(tensor: Tensor, heads: int) -> Tensor:
    """(B, Hkv, S, D) -> (B, Hq, S, D): each key/value head serves Hq / Hkv query heads."""
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def sum_heads(tensor: Tensor, kv_heads: int) -> Tensor:
    """(B, Hq, S, D) -> (B, Hkv, S, D): the adjoint of `expand_heads`."""
    batch, heads = tensor.shape[:2]
    return tensor.view(batch, kv_heads, heads // kv_heads, *tensor.shape[2:]).sum(2)


def raw_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """(B, Hq, R, D) x (B, Hkv, S, D) -> (B, Hq, R, S): `scale * q k'`, in the accumulation dtype."""
    wide = accumulation_dtype(query.dtype)
    return query.to(wide) @ expand_heads(key, query.shape[1]).to(wide).transpose(-1, -2) * scale


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """`c tanh(scores / c)` if there is a softcap c."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def capped_scores(query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Tensor:
    """`raw_scores`, capped."""
    return capped(raw_scores(query, key, scale), softcap)


def softcap_slope(scores: Tensor, softcap: float) -> Tensor:
    """d capped / d scores. Of the scores before the cap: capped ones carry the rounding of `c tanh`, which `1 - tanh^2` cancels down to."""
    return 1.0 - torch.tanh(scores / softcap).square()


def softmax_of_seen(scores: Tensor, seen: Tensor) -> Tensor:
    """Probabilities over the last dim; zero where a key is not seen, and in rows that see none.

    Relative to a row's largest score, which is exact: `exp(score - lse)` would have the rounding of lse in it, a step of its size.
    """
    return scores.masked_fill(~seen, float("-inf")).softmax(-1).masked_fill(~seen, 0.0)


def segment_one_hot(segments: Tensor | None, num_segments: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, S) segment ids, -1 = none -> (B, 1, S, N) of zeros and ones."""
    if segments is None or num_segments == 0:
        return torch.zeros(like.shape[0], 1, like.shape[2], 0, dtype=dtype, device=like.device)
    ids = torch.arange(num_segments, device=segments.device)
    return (segments[:, None, :, None] == ids).to(dtype)
