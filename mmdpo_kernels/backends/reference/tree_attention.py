"""`tree_attention` in plain PyTorch: dense scores, float32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor

from ...tree_mask import visible
from .scores import accumulation_dtype, capped_scores, expand_heads, segment_one_hot, softcap_slope, sum_heads

LSE_GRADIENT = True


def unavailable_reason(device_type: str, dtype: torch.dtype, **features: object) -> str | None:
    """None: the reference runs everywhere."""
    return None


def forward(
    query: Tensor,  # (B, Hq, S, D)
    key: Tensor,  # (B, Hkv, S, D)
    value: Tensor,  # (B, Hkv, S, Dv)
    tree_end: Tensor | None,  # (B, S)
    segments: Tensor | None,  # (B, S)
    num_segments: int,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> output (B, Hq, S, Dv), lse (B, Hq, S), mass (B, Hq, S, N); lse and mass in the accumulation dtype."""
    probabilities, lse, _ = _softmax(query, key, tree_end, scale, softcap, window)
    wide = probabilities.dtype
    output = probabilities @ expand_heads(value, query.shape[1]).to(wide)
    mass = probabilities @ segment_one_hot(segments, num_segments, query, wide)
    return output.to(query.dtype), lse, mass


def backward(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    grad_mass: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    tree_end: Tensor | None,
    segments: Tensor | None,
    num_segments: int,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of query, key, value. With P = softmax(scores):

    dP = dO V' + dmass at the key's segment;  dscores = P (dP - rowsum(P dP) + dlse).
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    probabilities, _, capped = _softmax(query, key, tree_end, scale, softcap, window)
    wide = probabilities.dtype
    grad_p = torch.zeros_like(probabilities)
    grad_value = torch.zeros(value.shape, dtype=wide, device=value.device)
    if grad_output is not None:
        grad_wide = grad_output.to(wide)
        grad_p += grad_wide @ expand_heads(value, heads).to(wide).transpose(-1, -2)
        grad_value = sum_heads(probabilities.transpose(-1, -2) @ grad_wide, kv_heads)
    if grad_mass is not None:
        grad_p += grad_mass.to(wide) @ segment_one_hot(segments, num_segments, query, wide).transpose(-1, -2)
    row = -(probabilities * grad_p).sum(-1, keepdim=True)
    if grad_lse is not None:
        row = row + grad_lse.to(wide)[..., None]
    grad_scores = probabilities * (grad_p + row) * scale
    if softcap is not None:
        grad_scores = grad_scores * softcap_slope(capped, softcap)
    grad_query = grad_scores @ expand_heads(key, heads).to(wide)
    grad_key = sum_heads(grad_scores.transpose(-1, -2) @ query.to(wide), kv_heads)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def _softmax(
    query: Tensor, key: Tensor, tree_end: Tensor | None, scale: float, softcap: float | None, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> probabilities (B, Hq, S, S) with zeros in fully masked rows, lse (B, Hq, S), capped scores."""
    batch, length = query.shape[0], query.shape[2]
    if tree_end is None:
        tree_end = torch.full((batch, length), length, dtype=torch.int32, device=query.device)
    capped = capped_scores(query, key, scale, softcap)
    scores = capped.masked_fill(~visible(tree_end, window)[:, None], float("-inf"))
    lse = scores.logsumexp(-1)
    probabilities = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    return probabilities, lse.to(accumulation_dtype(query.dtype)), capped
