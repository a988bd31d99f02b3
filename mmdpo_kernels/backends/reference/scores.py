"""Pieces that the reference attention ops share: scores, head groups, segments."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where the inputs are float64."""
    return torch.promote_types(dtype, torch.float32)


def expand_heads(tensor: Tensor, heads: int) -> Tensor:
    """(B, Hkv, S, D) -> (B, Hq, S, D): each key/value head serves Hq / Hkv query heads."""
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def sum_heads(tensor: Tensor, kv_heads: int) -> Tensor:
    """(B, Hq, S, D) -> (B, Hkv, S, D): the adjoint of `expand_heads`."""
    batch, heads = tensor.shape[:2]
    return tensor.view(batch, kv_heads, heads // kv_heads, *tensor.shape[2:]).sum(2)


def capped_scores(query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Tensor:
    """(B, Hq, R, D) x (B, Hkv, S, D) -> (B, Hq, R, S): `scale * q k'`, then `c tanh(. / c)` if there is a softcap."""
    wide = accumulation_dtype(query.dtype)
    scores = query.to(wide) @ expand_heads(key, query.shape[1]).to(wide).transpose(-1, -2) * scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def softcap_slope(capped: Tensor, softcap: float) -> Tensor:
    """d capped / d uncapped."""
    return 1.0 - (capped / softcap) ** 2


def segment_one_hot(segments: Tensor | None, num_segments: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, S) segment ids, -1 = none -> (B, 1, S, N) of zeros and ones."""
    if segments is None or num_segments == 0:
        return torch.zeros(like.shape[0], 1, like.shape[2], 0, dtype=dtype, device=like.device)
    ids = torch.arange(num_segments, device=segments.device)
    return (segments[:, None, :, None] == ids).to(dtype)
