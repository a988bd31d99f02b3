"""`attention_mass` in plain PyTorch: dense scores of the chosen rows, float32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor

from ...tree_mask import visible_rows
from ..calls import AttentionMassCall
from .scores import capped, expand_heads, raw_scores, segment_one_hot, softcap_slope, softmax_of_seen, sum_heads


def unavailable_reason(device_type: str, dtype: torch.dtype, **features: object) -> str | None:
    """None: the reference runs everywhere."""
    return None


def forward(
    query_rows: Tensor,  # (B, Hq, R, D)
    key: Tensor,  # (B, Hkv, S, D)
    call: AttentionMassCall,
) -> Tensor:
    """-> (B, Hq, R, N), (B, N) or (B, S), as `reduce` says."""
    probabilities, _ = _probabilities(query_rows, key, call)
    if call.reduce == "tokens":
        return probabilities.sum((1, 2)) / _row_weight(call.row_positions, query_rows, probabilities.dtype)
    mass = probabilities @ segment_one_hot(call.segments, call.num_segments, key, probabilities.dtype)
    if call.reduce is None:
        return mass
    return mass.sum((1, 2)) / _row_weight(call.row_positions, query_rows, mass.dtype)


def backward(
    grad: Tensor,
    query_rows: Tensor,
    key: Tensor,
    call: AttentionMassCall,
) -> tuple[Tensor, Tensor]:
    """-> gradients of query_rows and key: dscores = P (dP - rowsum(P dP)), dP the upstream gradient at the key's segment."""
    probabilities, scores = _probabilities(query_rows, key, call)
    wide = probabilities.dtype
    grad = grad.to(wide)
    if call.reduce is not None:
        grad = (grad / _row_weight(call.row_positions, query_rows, wide))[:, None, None, :]
    if call.reduce != "tokens":
        grad = grad @ segment_one_hot(call.segments, call.num_segments, key, wide).transpose(-1, -2)
    grad_scores = probabilities * (grad - (probabilities * grad).sum(-1, keepdim=True))
    if call.softcap is not None:
        grad_scores = grad_scores * softcap_slope(scores, call.softcap)
    grad_scores = grad_scores * call.scale
    grad_query = grad_scores @ expand_heads(key, query_rows.shape[1]).to(wide)
    grad_key = sum_heads(grad_scores.transpose(-1, -2) @ query_rows.to(wide), key.shape[1])
    return grad_query.to(query_rows.dtype), grad_key.to(key.dtype)


def _probabilities(query_rows: Tensor, key: Tensor, call: AttentionMassCall) -> tuple[Tensor, Tensor]:
    """-> probabilities (B, Hq, R, S), zero in unused rows and rows that see no key; scores before the softcap."""
    tree_end = call.tree_end
    if tree_end is None:
        tree_end = torch.full((key.shape[0], key.shape[2]), key.shape[2], dtype=torch.int32, device=key.device)
    scores = raw_scores(query_rows, key, call.scale)
    seen = visible_rows(call.row_positions, tree_end, call.window, call.reach)[:, None]
    limited = capped(scores, call.softcap)
    if call.lse is None:
        return softmax_of_seen(limited, seen), scores
    # Of the accuracy that lse was given in. Where no key is seen it may be anything.
    total = call.lse.to(scores.dtype).masked_fill(call.lse == float("-inf"), 0.0)[..., None]
    return torch.exp(limited.masked_fill(~seen, float("-inf")) - total).masked_fill(~seen, 0.0), scores


def _row_weight(row_positions: Tensor, query_rows: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1): heads times used rows, at least one so that a batch row without used rows gives zeros."""
    return ((row_positions >= 0).sum(1, keepdim=True) * query_rows.shape[1]).clamp(min=1).to(dtype)
