"""`tree_attention` in C++ on the CPU: what a tree hides is never computed, and nothing is merged afterwards.

Products and sums are float32 ones: float16 and bfloat16 are widened as they are read, which is exact, and results rounded once. On a CPU
with AMX, products of bfloat16 are made as such, with sums in float32, and probabilities and their gradients are rounded for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..calls import TreeAttentionCall
from ..layout import dense_heads, empty_head_last, int32
from .extension import address, load, module

OP = "tree_attention"

LSE_GRADIENT = True
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_MISSING = {
    "softcap": "softcap",
    "window": "sliding windows",
    "mass": "per-segment mass",
    "value_dim": "head dim of values other than that of keys",
}


def unavailable_reason(device_type: str, dtype: torch.dtype, **features: object) -> str | None:
    """Why this backend cannot serve the call, or None."""
    native = load()
    if isinstance(native, str):
        return native
    if device_type != "cpu":
        return f"it runs on cpu tensors, got {device_type}"
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, got {dtype}"
    for name, missing in _MISSING.items():
        if features.get(name):
            return f"it has no {missing}"
    try:
        return native.tree_attention_unavailable() or None
    except ValueError as error:
        return str(error)


def forward(
    query: Tensor,  # (B, Hq, S, D)
    key: Tensor,  # (B, Hkv, S, D)
    value: Tensor,  # (B, Hkv, S, D)
    call: TreeAttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> output (B, Hq, S, D), lse (B, Hq, S), mass (B, Hq, S, 0). At most `torch.get_num_threads()` threads work."""
    batch, heads, length, dim = query.shape
    output = empty_head_last(query, dim, torch.float32)
    lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    if query.numel():
        tree = int32(call.tree_end), int32(call.reach)
        module(OP).tree_attention_forward(**_arguments(query, key, value, tree, call.scale, output, lse))
    return output.to(query.dtype), lse, lse.new_empty(batch, heads, length, 0)


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
    """-> gradients of query, key, value, through output and lse."""
    dtype = query.dtype
    grads = tuple(empty_head_last(tensor, tensor.shape[-1], torch.float32) for tensor in (query, key, value))
    if query.numel():
        tree = int32(call.tree_end), int32(call.reach)
        grad_output = torch.zeros_like(output) if grad_output is None else dense_heads(grad_output)
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        module(OP).tree_attention_backward(
            **_arguments(query, key, value, tree, call.scale, output, lse),
            grad_output=_heads(grad_output),
            grad_lse=address(grad_lse),
            grad_query=_heads(grads[0]),
            grad_key=_heads(grads[1]),
            grad_value=_heads(grads[2]),
        )
    return grads[0].to(dtype), grads[1].to(dtype), grads[2].to(dtype)


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: tuple[Tensor | None, Tensor | None],  # tree_end, reach
    scale: float,
    output: Tensor,
    lse: Tensor,
) -> dict[str, object]:
    batch, heads, length, dim = query.shape
    return {
        "sizes": (batch, heads, key.shape[1], length, dim),
        "dtype": module(OP).dtypes.index(str(query.dtype).removeprefix("torch.")),
        "query": _heads(query),
        "key": _heads(key),
        "value": _heads(value),
        "tree_end": address(tree[0]),
        "reach": address(tree[1]),
        "scale": scale,
        "num_threads": torch.get_num_threads(),
        "output": _heads(output),
        "lse": address(lse),
    }


def _heads(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.stride()[:3]
