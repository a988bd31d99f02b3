"""The libraries that have variable-length flash attention, called by their raw forward and backward, and which one serves a call.

All take queries (Tq, Hq, D), keys and values (Tk, Hkv, D) and int32 sequence starts, align a causal mask with the last key of each
sequence (bottom right), count a window backwards from there, and give the natural-log lse as (Hq, Tq).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .plan import Call


@dataclass(frozen=True, kw_only=True)
class Options:
    """What else a call is made with."""

    scale: float
    softcap: float | None
    window: int | None
    """Keys that a query sees at most, counted back along its path, itself included."""

    def sides(self, call: Call) -> tuple[int, int]:
        """Keys seen to the left and right of a query's own; -1 is all."""
        if not call.causal:
            return -1, -1  # the plan has cut the keys
        return (-1 if self.window is None else self.window - 1), 0


@dataclass(frozen=True, kw_only=True)
class Library:
    """One library; names it lacks are reported by `unavailable_reason`, not raised on import."""

    name: str
    unavailable_reason: Callable[[str, torch.dtype, int, bool], str | None]
    """(device type, dtype, head dim, softcap used) -> why it cannot serve, or None."""
    forward: Callable[[Tensor, Tensor, Tensor, Call, Options], tuple[Tensor, Tensor]]
    """-> output (Tq, Hq, D), lse (Hq, Tq)."""
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Call, Options], tuple[Tensor, Tensor, Tensor]]
    """(grad of output, query, key, value, output, lse, call, options) -> gradients of query, key, value."""


def choose(device_type: str, dtype: torch.dtype, head_dim: int, softcap: bool) -> Library | str:
    """The first library of `LIBRARIES` that can serve the call, or why none can."""
    reasons = []
    for library in LIBRARIES:
        reason = library.unavailable_reason(device_type, dtype, head_dim, softcap)
        if reason is None:
            return library
        reasons.append(f"{library.name}: {reason}")
    # What holds for the tensors holds for all libraries alike.
    return _wrong_tensors(device_type, dtype, head_dim) or "; ".join(reasons)


def _wrong_tensors(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    if device_type != "cuda":
        return f"variable-length flash attention runs on cuda tensors, got {device_type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"variable-length flash attention takes float16 and bfloat16, got {dtype}"
    if head_dim % 8 or head_dim > 256:
        return f"variable-length flash attention takes head dims up to 256 that are multiples of 8, got {head_dim}"
    return None


def _needs(
    module: str, names: tuple[str, ...] = (), *, gpus: tuple[int, int], largest: int = 256, has_softcap: bool = False
) -> Callable[[str, torch.dtype, int, bool], str | None]:
    """An `unavailable_reason`: the module has these functions, for GPUs of these major compute capabilities and head dims up to `largest`."""

    def unavailable_reason(device_type: str, dtype: torch.dtype, head_dim: int, softcap: bool) -> str | None:
        reason = _wrong_tensors(device_type, dtype, head_dim)
        if reason is not None:
            return reason
        major = torch.cuda.get_device_capability()[0]
        if not gpus[0] <= major <= gpus[1]:
            return f"is used on GPUs of compute capability {gpus[0]}.x to {gpus[1]}.x, this one has {major}.x"
        if head_dim > largest:
            return f"is used up to head dim {largest}, got {head_dim}"
        if softcap and not has_softcap:
            return "has no softcap"
        return _missing(module, names)

    return unavailable_reason


@functools.cache
def _missing(module: str, names: tuple[str, ...]) -> str | None:
    try:
        found = importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # a library built for another PyTorch fails in all these ways
        return f"cannot be imported ({error})"
    lacking = [name for name in names if not hasattr(found, name)]
    return f"this version of {module} has no {', '.join(lacking)}" if lacking else None


def _torch_forward(query: Tensor, key: Tensor, value: Tensor, call: Call, options: Options) -> tuple[Tensor, Tensor]:
    left, right = options.sides(call)
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        call.query_starts,
        call.key_starts,
        call.max_queries,
        call.max_keys,
        0.0,
        call.causal and left < 0,
        False,
        scale=options.scale,
        window_size_left=left,
        window_size_right=right,
    )
    return output, lse


def _torch_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, call: Call, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    left, right = options.sides(call)
    # Read only with dropout.
    rng_state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return torch.ops.aten._flash_attention_backward(
        grad,
        query,
        key,
        value,
        output,
        lse,
        call.query_starts,
        call.key_starts,
        call.max_queries,
        call.max_keys,
        0.0,
        call.causal and left < 0,
        rng_state,
        torch.empty(0, device=query.device),
        scale=options.scale,
        window_size_left=left,
        window_size_right=right,
    )


def _sequences(call: Call) -> dict[str, Any]:
    return {
        "cu_seqlens_q": call.query_starts,
        "cu_seqlens_k": call.key_starts,
        "max_seqlen_q": call.max_queries,
        "max_seqlen_k": call.max_keys,
    }


def _flash2_forward(query: Tensor, key: Tensor, value: Tensor, call: Call, options: Options) -> tuple[Tensor, Tensor]:
    left, right = options.sides(call)
    return importlib.import_module("flash_attn.flash_attn_interface")._flash_attn_varlen_forward(
        query,
        key,
        value,
        **_sequences(call),
        dropout_p=0.0,
        softmax_scale=options.scale,
        causal=call.causal,
        window_size_left=left,
        window_size_right=right,
        softcap=options.softcap or 0.0,
        alibi_slopes=None,
        return_softmax=False,
        block_table=None,
    )[:2]


def _flash2_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, call: Call, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    left, right = options.sides(call)
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    importlib.import_module("flash_attn.flash_attn_interface")._flash_attn_varlen_backward(
        grad,
        query,
        key,
        value,
        output,
        lse,
        *grads,
        **_sequences(call),
        dropout_p=0.0,
        softmax_scale=options.scale,
        causal=call.causal,
        window_size_left=left,
        window_size_right=right,
        softcap=options.softcap or 0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return grads


def _flash3_unavailable_reason(device_type: str, dtype: torch.dtype, head_dim: int, softcap: bool) -> str | None:
    reason = _needs("flash_attn_interface", gpus=(9, 9), has_softcap=True)(device_type, dtype, head_dim, softcap)
    if reason is None and not hasattr(torch.ops.flash_attn_3, "_flash_attn_backward"):
        return "this version has no operator flash_attn_3::_flash_attn_backward"
    return reason


def _flash3_forward(query: Tensor, key: Tensor, value: Tensor, call: Call, options: Options) -> tuple[Tensor, Tensor]:
    left, right = options.sides(call)
    return torch.ops.flash_attn_3._flash_attn_forward(
        query,
        key,
        value,
        **_sequences(call),
        softmax_scale=options.scale,
        causal=call.causal,
        window_size_left=left,
        window_size_right=right,
        softcap=options.softcap or 0.0,
    )[:2]


def _flash3_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, call: Call, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    left, right = options.sides(call)
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    torch.ops.flash_attn_3._flash_attn_backward(
        grad,
        query,
        key,
        value,
        output,
        lse,
        **_sequences(call),
        dq=grads[0],
        dk=grads[1],
        dv=grads[2],
        softmax_scale=options.scale,
        is_causal=call.causal,
        window_size_left=left,
        window_size_right=right,
        softcap=options.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return grads


def _flash4_forward(query: Tensor, key: Tensor, value: Tensor, call: Call, options: Options) -> tuple[Tensor, Tensor]:
    return importlib.import_module("flash_attn.cute.interface")._flash_attn_fwd(
        query, key, value, **_sequences(call), **_flash4_options(call, options), return_lse=True
    )[:2]


def _flash4_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, call: Call, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    return importlib.import_module("flash_attn.cute.interface")._flash_attn_bwd(
        query,
        key,
        value,
        output,
        grad,
        lse,
        **_sequences(call),
        **_flash4_options(call, options),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )[:3]


def _flash4_options(call: Call, options: Options) -> dict[str, Any]:
    left, right = (None if side < 0 else side for side in options.sides(call))
    return {"softmax_scale": options.scale, "causal": call.causal, "window_size_left": left, "window_size_right": right}


LIBRARIES: tuple[Library, ...] = (
    Library(
        name="flash-attn 3",
        unavailable_reason=_flash3_unavailable_reason,
        forward=_flash3_forward,
        backward=_flash3_backward,
    ),
    Library(
        name="flash-attn 4",
        unavailable_reason=_needs("flash_attn.cute.interface", ("_flash_attn_fwd", "_flash_attn_bwd"), gpus=(9, 11), largest=128),
        forward=_flash4_forward,
        backward=_flash4_backward,
    ),
    Library(
        name="flash-attn 2",
        unavailable_reason=_needs(
            "flash_attn.flash_attn_interface",
            ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"),
            gpus=(8, 12),
            has_softcap=True,
        ),
        forward=_flash2_forward,
        backward=_flash2_backward,
    ),
    Library(
        name="PyTorch",
        unavailable_reason=_needs("torch", gpus=(8, 12)),
        forward=_torch_forward,
        backward=_torch_backward,
    ),
)
"""In the order in which they are tried: the one made for the GPU first. Not measured against each other."""
