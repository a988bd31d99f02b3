"""`attention_mass`: how much attention chosen query rows put on each segment of the keys; needs no value and no attention output."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends.calls import AttentionMassCall
from ..backends.reference import attention_mass as reference
from ..backends.registry import resolve
from .checks import (
    check_devices,
    check_heads,
    check_positive,
    check_range,
    check_reach,
    check_segments,
    check_tensor,
    check_tree_end,
    default_scale,
)
from .flat import tensors_and_rest, with_tensors
from .precision import autocast_off, without_autocast

OP = "attention_mass"


class _AttentionMass(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, query_rows: Tensor, key: Tensor, call: AttentionMassCall, backend: ModuleType) -> Tensor:
        tensors, ctx.call = tensors_and_rest(call)
        ctx.save_for_backward(query_rows, key, *tensors)
        ctx.backend = backend
        return backend.forward(query_rows, key, call)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query_rows, key, *tensors = ctx.saved_tensors
        backend = ctx.backend if hasattr(ctx.backend, "backward") else reference
        return *backend.backward(grad, query_rows, key, with_tensors(ctx.call, tensors)), None, None


def attention_mass(
    query_rows: Tensor,  # (B, Hq, R, D)
    key: Tensor,  # (B, Hkv, S, D)
    segments: Tensor,  # (B, S)
    *,
    row_positions: Tensor,  # (B, R)
    num_segments: int,
    tree_end: Tensor | None = None,  # (B, S)
    reach: Tensor | None = None,  # (B, S)
    lse: Tensor | None = None,  # (B, Hq, R)
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    reduce: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention probability of chosen query rows on each segment, without running attention.

    Source: the attention ratio of MIA-DPO (arXiv 2410.17637, section 3.2) is `mass[target] / mass.sum()`. Equivalent PyTorch, for Hq = Hkv::

        seen = (j <= row_positions[..., None]) & (row_positions[..., None] < tree_end[:, None, :])  # with reach, j < reach[row_positions]
        p = (scale * query_rows @ key.mT).masked_fill(~seen[:, None], -inf).softmax(-1)
        mass = p @ one_hot(segments)              # reduce=None;  "mean": mass.mean((1, 2));  "tokens": p.mean((1, 2))

    Args:
        query_rows: (B, Hq, R, D) rows of the query, any floating dtype, after position encoding.
        key: (B, Hkv, S, D).
        segments: (B, S) integer; segment of each key, -1 = none.
        row_positions: (B, R) integer; packed index of each row among the keys, -1 = unused row.
        num_segments: number of segments N.
        tree_end: (B, S) integer, see `tree_attention`; None = causal.
        reach: (B, S) integer by packed index of the row, not by row, see `tree_attention`; None = no row looks ahead.
        lse: (B, Hq, R) log-sum-exp of the rows where it is known, which saves a pass. It is a hint: gradients are those of the softmax.
        scale: factor on the scores, default `D ** -0.5`.
        softcap: c in `c tanh(scores / c)`.
        window: a query sees at most this many tokens back along its own path, itself included.
        reduce: None -> (B, Hq, R, N); "mean" -> (B, N) over heads and used rows; "tokens" -> (B, S), each key's probability averaged over
            heads and used rows.
        backend: "auto", or a name from `backends()["attention_mass"]`.

    Returns:
        float32 (float64 for float64 inputs). Unused rows, and rows that see no key, are zero. Differentiable in query_rows and key.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or shape, or a named backend that cannot serve the call.
    """
    prepared = prepare_attention_mass(
        query_rows,
        key,
        segments,
        row_positions=row_positions,
        num_segments=num_segments,
        tree_end=tree_end,
        reach=reach,
        lse=lse,
        scale=scale,
        softcap=softcap,
        window=window,
        reduce=reduce,
        backend=backend,
    )
    return _AttentionMass.apply(query_rows, key, prepared.call, prepared.module)


class PreparedMass(NamedTuple):
    """A checked call of `attention_mass`, to be made with several queries and keys of the same shapes and dtype, without gradients."""

    module: ModuleType
    call: AttentionMassCall

    def __call__(self, query_rows: Tensor, key: Tensor) -> Tensor:
        with autocast_off(key.device.type):
            found: Tensor = self.module.forward(query_rows, key, self.call)
        return found


def prepare_attention_mass(
    query_rows: Tensor,  # (B, Hq, R, D)
    key: Tensor,  # (B, Hkv, S, D)
    segments: Tensor,  # (B, S)
    *,
    row_positions: Tensor,  # (B, R)
    num_segments: int,
    tree_end: Tensor | None = None,  # (B, S)
    reach: Tensor | None = None,  # (B, S)
    lse: Tensor | None = None,  # (B, Hq, R)
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    reduce: str | None = None,
    backend: str = "auto",
) -> PreparedMass:
    """Arguments of `attention_mass`, checked, and the backend for them; nothing is computed."""
    check_tensor(OP, "query_rows", query_rows, ("B", "Hq", "R", "D"), floating=True)
    batch, heads, rows, dim = query_rows.shape
    check_tensor(OP, "key", key, (batch, "Hkv", "S", dim), floating=True)
    length = key.shape[2]
    check_heads(OP, query_rows, key)
    check_devices(OP, query_rows, segments=segments, row_positions=row_positions, tree_end=tree_end, reach=reach, lse=lse)
    check_segments(OP, segments, num_segments, batch, length)
    check_tensor(OP, "row_positions", row_positions, (batch, rows), floating=False)
    check_range(OP, "row_positions", row_positions, -1, length)
    check_tree_end(OP, tree_end, batch, length)
    check_reach(OP, reach, tree_end, batch, length)
    if lse is not None:
        check_tensor(OP, "lse", lse, (batch, heads, rows), floating=True)
    check_positive(OP, softcap=softcap, window=window)
    if reduce not in (None, "mean", "tokens"):
        raise ValueError(f"{OP}: reduce must be None, 'mean' or 'tokens', got {reduce!r}")
    tree_window = window is not None and tree_end is not None
    module = resolve(
        OP,
        backend,
        key.device,
        key.dtype,
        softcap=softcap is not None,
        tree_window=tree_window,
        reach=reach is not None,
        head_dim=dim,
        length=length,
        num_segments=num_segments,
    )
    call = AttentionMassCall(
        segments=segments,
        row_positions=row_positions,
        num_segments=num_segments,
        tree_end=tree_end,
        lse=lse,
        scale=default_scale(scale, dim),
        softcap=softcap,
        window=window,
        reduce=reduce,
        reach=reach,
    )
    return PreparedMass(module, call)
