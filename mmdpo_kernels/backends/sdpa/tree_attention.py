"""`tree_attention` by PyTorch's flash attention, one call a rectangle of the tree; nothing S x S is built.

A run of keys is a causal square plus one full rectangle for the queries after it in its subtree, a picture that sees itself both ways a full
square. Outputs of rectangles that share query
rows are merged through their log-sum-exp; in backward each rectangle is given the merged output and lse, so gradients add up exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...tree_mask import Rectangle, causal_plan, rectangles
from ..calls import TreeAttentionCall
from ..layout import accumulation_dtype
from . import flash

LSE_GRADIENT = False
"""The kernels' backward takes no gradient of the log-sum-exp."""


def unavailable_reason(device_type: str, dtype: torch.dtype, *, head_dim: int = 64, **features: object) -> str | None:
    """Why this backend cannot serve the call, or None."""
    reason = flash.unavailable_reason(device_type, dtype, head_dim)
    if reason is not None:
        return reason
    if features.get("softcap"):
        return "PyTorch's attention has no softcap"
    if features.get("window"):
        return "sliding windows are not rectangles"
    if features.get("mass"):
        return "PyTorch's attention returns no per-segment mass"
    if features.get("value_dim"):
        return "PyTorch's flash attention needs equal head dims of key and value"
    return None


def forward(
    query: Tensor,  # (B, Hq, S, D)
    key: Tensor,  # (B, Hkv, S, D)
    value: Tensor,  # (B, Hkv, S, D)
    call: TreeAttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> output (B, Hq, S, D), lse (B, Hq, S), mass (B, Hq, S, 0)."""
    batch, heads, length, dim = query.shape
    wide = accumulation_dtype(query.dtype)
    lse = torch.full((batch, heads, length), float("-inf"), dtype=wide, device=query.device)
    mass = torch.empty(batch, heads, length, 0, dtype=wide, device=query.device)
    if query.numel() == 0:  # the kernels divide by the length
        return torch.empty_like(query), lse, mass
    parts = list(_rectangles(call, batch, length))
    # Heads last but one in memory, as models want the output next, so that no layer copies it. Sums are made in float32.
    dtype = query.dtype if all(part.new_queries for part in parts) else wide
    merged = torch.zeros(batch, length, heads, dim, dtype=dtype, device=query.device).transpose(1, 2)
    for rows, rectangle, new_queries, _ in parts:
        q, k, causal = _slices(rectangle)
        for group in _head_groups(query, key):
            part, part_lse = flash.forward(query[rows, group, q], key[rows, :, k], value[rows, :, k], causal, call.scale)
            if new_queries:
                merged[rows, group, q], lse[rows, group, q] = part, part_lse
            else:
                _merge(merged[rows, group, q], lse[rows, group, q], part, part_lse)
    return merged.to(query.dtype), lse, mass


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
    """-> gradients of query, key, value through the output; a gradient through lse is refused."""
    if grad_lse is not None:
        raise ValueError("tree_attention: backend 'sdpa' has no gradient through lse of its own")
    parts = list(_rectangles(call, query.shape[0], query.shape[2]))
    groups = _head_groups(query, key)
    alone = len(groups) == 1 and all(part.new_queries and part.new_keys for part in parts)
    # Sums are made in float32.
    dtype = query.dtype if alone else accumulation_dtype(query.dtype)
    grads = tuple(torch.zeros_like(t, dtype=dtype) for t in (query, key, value))
    if grad_output is not None and query.numel():
        for rows, rectangle, new_queries, new_keys in parts:
            q, k, causal = _slices(rectangle)
            for number, group in enumerate(groups):
                at_query, at_key = (rows, group, q), (rows, slice(None), k)
                found = flash.backward(
                    grad_output[at_query],
                    query[at_query],
                    key[at_key],
                    value[at_key],
                    output[at_query],
                    lse[at_query],
                    causal,
                    call.scale,
                )
                first = new_keys and number == 0
                for total, part, where, new in zip(
                    grads, found, (at_query, at_key, at_key), (new_queries, first, first), strict=True
                ):
                    if new:
                        total[where] = part
                    else:
                        total[where] += part
    return grads[0].to(query.dtype), grads[1].to(key.dtype), grads[2].to(value.dtype)


class _Part(NamedTuple):
    """One call of the kernel."""

    rows: slice
    """Of the batch."""
    rectangle: Rectangle
    new_queries: bool
    """Whether no part before it had one of its queries."""
    new_keys: bool


def _rectangles(call: TreeAttentionCall, batch: int, length: int) -> Iterator[_Part]:
    causal = call.tree_end is None and call.reach is None
    for plan in causal_plan(batch, length) if causal else rectangles(call.tree_end, call.reach):
        queries = keys = 0
        for rectangle in plan.rectangles:
            yield _Part(slice(plan.b0, plan.b1), rectangle, rectangle.q0 >= queries, rectangle.k0 >= keys)
            queries, keys = max(queries, rectangle.q1), max(keys, rectangle.k1)


def _slices(rectangle: Rectangle) -> tuple[slice, slice, bool]:
    return slice(rectangle.q0, rectangle.q1), slice(rectangle.k0, rectangle.k1), rectangle.causal


def _head_groups(query: Tensor, key: Tensor) -> list[slice]:
    """Query heads of one call each: all, where the kernel knows groups of heads, else the g-th of every group, g = 0, 1, ….

    These are strided views, so shared keys and values are never copied.
    """
    per_group = 1 if flash.serves_groups(query.device.type) else query.shape[1] // key.shape[1]
    return [slice(g, None, per_group) for g in range(per_group)]


def _merge(merged: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Fold one rectangle's output into the rows' running softmax, in place."""
    total = torch.logaddexp(lse, part_lse.to(lse.dtype))
    merged.mul_(torch.exp(lse - total)[..., None]).add_(part * torch.exp(part_lse - total)[..., None])
    lse.copy_(total)
