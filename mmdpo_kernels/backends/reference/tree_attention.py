"""`tree_attention` in plain PyTorch: dense scores, float32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor

from ...tree_mask import visible
from ..calls import TreeAttentionCall
from .scores import capped, expand_heads, raw_scores, segment_one_hot, softcap_slope, softmax_of_seen, sum_heads

LSE_GRADIENT = True


def unavailable_reason(device_type: str, dtype: torch.dtype, **features: object) -> str | None:
    """None: the reference runs everywhere."""
    return None


def forward(
    query: Tensor,  # (B, Hq, S, D)
    key: Tensor,  # (B, Hkv, S, D)
    value: Tensor,  # (B, Hkv, S, Dv)
    call: TreeAttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> output (B, Hq, S, Dv), lse (B, Hq, S), mass (B, Hq, S, N); lse and mass in the accumulation dtype."""
    scores, seen = _scores(query, key, call)
    scores = capped(scores, call.softcap)
    probabilities, lse = softmax_of_seen(scores, seen), scores.masked_fill(~seen, float("-inf")).logsumexp(-1)
    wide = probabilities.dtype
    output = probabilities @ expand_heads(value, query.shape[1]).to(wide)
    mass = probabilities @ segment_one_hot(call.segments, call.num_segments, query, wide)
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
    call: TreeAttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of query, key, value. With P = softmax(scores):

    dP = dO V' + dmass at the key's segment;  dscores = P (dP - rowsum(P dP)) + P dlse.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    scores, seen = _scores(query, key, call)
    probabilities = softmax_of_seen(capped(scores, call.softcap), seen)
    wide = probabilities.dtype
    grad_p = torch.zeros_like(probabilities)
    grad_value = torch.zeros(value.shape, dtype=wide, device=value.device)
    if grad_output is not None:
        grad_wide = grad_output.to(wide)
        grad_p += grad_wide @ expand_heads(value, heads).to(wide).transpose(-1, -2)
        grad_value = sum_heads(probabilities.transpose(-1, -2) @ grad_wide, kv_heads)
    if grad_mass is not None:
        grad_p += grad_mass.to(wide) @ segment_one_hot(call.segments, call.num_segments, query, wide).transpose(-1, -2)
    grad_scores = probabilities * (grad_p - (probabilities * grad_p).sum(-1, keepdim=True))
    if grad_lse is not None:
        # Beside the difference, not in it: what cancels there would leave the rounding of a sum with this.
        grad_scores = grad_scores + probabilities * grad_lse.to(wide)[..., None]
    if call.softcap is not None:
        grad_scores = grad_scores * softcap_slope(scores, call.softcap)
    grad_scores = grad_scores * call.scale
    grad_query = grad_scores @ expand_heads(key, heads).to(wide)
    grad_key = sum_heads(grad_scores.transpose(-1, -2) @ query.to(wide), kv_heads)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def _scores(query: Tensor, key: Tensor, call: TreeAttentionCall) -> tuple[Tensor, Tensor]:
    """-> scores (B, Hq, S, S) before a softcap, and which of them count, (B, 1, S, S)."""
    batch, length = query.shape[0], query.shape[2]
    tree_end = call.tree_end
    if tree_end is None:
        tree_end = torch.full((batch, length), length, dtype=torch.int32, device=query.device)
    return raw_scores(query, key, call.scale), visible(tree_end, call.window, call.reach)[:, None]
