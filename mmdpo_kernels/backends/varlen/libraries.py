"""The libraries that have variable-length flash attention, called by their raw forward and backward, and which one serves a call.

All take queries (Tq, Hq, D), keys and values (Tk, Hkv, D) and int32 sequence starts, align a causal mask with the last key of each
sequence (bottom right), count a window backwards from there, and give the natural-log lse as (Hq, Tq).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import from_hub
from .library import Functions, Library, Options, missing, needs, wrong_tensors
from .plan import Call


def choose(device_type: str, dtype: torch.dtype, head_dim: int, softcap: bool) -> Library | str:
    """The first library of `LIBRARIES` that can serve the call, or why none can."""
    reasons = []
    for library in LIBRARIES:
        reason = library.unavailable_reason(device_type, dtype, head_dim, softcap)
        if reason is None:
            return library
        reasons.append(f"{library.name}: {reason}")
    # What holds for the tensors holds for all libraries alike.
    return wrong_tensors(device_type, dtype, head_dim) or "; ".join(reasons)


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


def _flash2_forward(
    functions: Functions, query: Tensor, key: Tensor, value: Tensor, call: Call, options: Options
) -> tuple[Tensor, Tensor]:
    left, right = options.sides(call)
    return functions()._flash_attn_varlen_forward(
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
    functions: Functions,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    call: Call,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    left, right = options.sides(call)
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    functions()._flash_attn_varlen_backward(
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


def _missing_flash3() -> str | None:
    reason = missing("flash_attn_interface")
    if reason is None and not hasattr(torch.ops.flash_attn_3, "_flash_attn_backward"):
        return "this version has no operator flash_attn_3::_flash_attn_backward"
    return reason


def _flash3_forward(
    functions: Functions, query: Tensor, key: Tensor, value: Tensor, call: Call, options: Options
) -> tuple[Tensor, Tensor]:
    left, right = options.sides(call)
    return functions()._flash_attn_forward(
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
    functions: Functions,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    call: Call,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    left, right = options.sides(call)
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    functions()._flash_attn_backward(
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


def _flash2_installed() -> Any:
    return importlib.import_module("flash_attn.flash_attn_interface")


def _flash2(name: str, functions: Functions, lacks: Callable[[], str | None]) -> Library:
    return Library(
        name=name,
        unavailable_reason=needs(lacks, gpus=(8, 12), has_softcap=True),
        forward=partial(_flash2_forward, functions),
        backward=partial(_flash2_backward, functions),
    )


def _flash3(name: str, functions: Functions, lacks: Callable[[], str | None]) -> Library:
    return Library(
        name=name,
        unavailable_reason=needs(lacks, gpus=(9, 9), has_softcap=True),
        forward=partial(_flash3_forward, functions),
        backward=partial(_flash3_backward, functions),
    )


LIBRARIES: tuple[Library, ...] = (
    _flash3("flash-attn 3", lambda: torch.ops.flash_attn_3, _missing_flash3),
    _flash3(
        "flash-attn 3 of the Hub", partial(from_hub.interface, from_hub.FLASH_3), partial(from_hub.missing, from_hub.FLASH_3)
    ),
    Library(
        name="flash-attn 4",
        unavailable_reason=needs(
            partial(missing, "flash_attn.cute.interface", "_flash_attn_fwd", "_flash_attn_bwd"), gpus=(9, 11), largest=128
        ),
        forward=_flash4_forward,
        backward=_flash4_backward,
    ),
    _flash2(
        "flash-attn 2",
        _flash2_installed,
        partial(missing, "flash_attn.flash_attn_interface", "_flash_attn_varlen_forward", "_flash_attn_varlen_backward"),
    ),
    _flash2(
        "flash-attn 2 of the Hub", partial(from_hub.interface, from_hub.FLASH_2), partial(from_hub.missing, from_hub.FLASH_2)
    ),
    Library(
        name="PyTorch",
        unavailable_reason=needs(partial(missing, "torch"), gpus=(8, 12)),
        forward=_torch_forward,
        backward=_torch_backward,
    ),
)
"""In the order in which they are tried: the one made for the GPU first, the installed one before the Hub's. Not measured against each other."""
