"""`tree_attention` by one variable-length call over un-shared paths; queries are computed once, keys and values of shared nodes repeated.

The keys' and values' gradients are summed over their copies in float32, copy after copy, in an order that the tree alone fixes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..calls import TreeAttentionCall
from ..layout import accumulation_dtype
from . import libraries
from .library import Library, Options
from .plan import Call, plan

LSE_GRADIENT = False
"""The libraries' backward takes no gradient of the log-sum-exp."""


def unavailable_reason(
    device_type: str, dtype: torch.dtype, *, head_dim: int = 64, softcap: bool = False, **features: object
) -> str | None:
    """Why this backend cannot serve the call, or None."""
    if features.get("mass"):
        return "variable-length flash attention returns no per-segment mass"
    if features.get("reach"):
        return "variable-length flash attention has no reach: a sequence's queries see all its keys, or none past their own"
    if features.get("value_dim"):
        return "variable-length flash attention is used with equal head dims of key and value only"
    library = libraries.choose(device_type, dtype, head_dim, softcap)
    return library if isinstance(library, str) else None


def forward(
    query: Tensor,  # (B, Hq, S, D)
    key: Tensor,  # (B, Hkv, S, D)
    value: Tensor,  # (B, Hkv, S, D)
    call: TreeAttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> output (B, Hq, S, D), lse (B, Hq, S), mass (B, Hq, S, 0)."""
    batch, heads, length, _ = query.shape
    wide = accumulation_dtype(query.dtype)
    tokens = [_tokens(tensor) for tensor in (query, key, value)]
    outputs, lses = [], []
    if query.numel():
        library, options = _library(query, call)
        for part in plan(call.tree_end, batch, length, call.window, query.device):
            output, lse = library.forward(*_gather(part, *tokens), part, options)
            outputs.append((part.rows, output))
            lses.append((part.rows, lse.T))
    # Heads last but one in memory, as models want the output next, so that no layer copies it.
    output = _spread(outputs, tokens[0].shape, 0.0, query)
    lse = _spread(lses, (batch * length, heads), float("-inf"), query.new_empty(0, dtype=wide))
    mass = query.new_empty(batch, heads, length, 0, dtype=wide)
    return _heads(output, batch, length), _heads(lse, batch, length).contiguous(), mass


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
        raise ValueError("tree_attention: backend 'varlen' has no gradient through lse of its own")
    batch, _, length, _ = query.shape
    wide = accumulation_dtype(query.dtype)
    tokens = [_tokens(tensor) for tensor in (query, key, value)]
    grad_queries = []
    grad_key, grad_value = (torch.zeros_like(tensor, dtype=wide) for tensor in tokens[1:])
    if grad_output is not None and query.numel():
        library, options = _library(query, call)
        rows = [_tokens(tensor) for tensor in (grad_output, output, lse)]
        for part in plan(call.tree_end, batch, length, call.window, query.device):
            its_grad, its_output, its_lse = (_take(tensor, part.rows) for tensor in rows)
            found = library.backward(its_grad, *_gather(part, *tokens), its_output, its_lse.T.contiguous(), part, options)
            grad_queries.append((part.rows, found[0]))
            _add_copies(grad_key, found[1], part)
            _add_copies(grad_value, found[2], part)
    grad_query = _spread(grad_queries, tokens[0].shape, 0.0, query)
    grads = tuple(_heads(grad.to(query.dtype), batch, length) for grad in (grad_query, grad_key, grad_value))
    return grads[0], grads[1], grads[2]


def _library(query: Tensor, call: TreeAttentionCall) -> tuple[Library, Options]:
    library = libraries.choose(query.device.type, query.dtype, query.shape[-1], call.softcap is not None)
    if isinstance(library, str):
        raise RuntimeError(f"tree_attention: {library}")
    return library, Options(scale=call.scale, softcap=call.softcap, window=call.window)


def _tokens(tensor: Tensor) -> Tensor:
    """(B, H, S, …) -> (B * S, H, …), a view where memory is as models make it."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _heads(tokens: Tensor, batch: int, length: int) -> Tensor:
    """(B * S, H, …) -> (B, H, S, …), the inverse."""
    return tokens.reshape(batch, length, *tokens.shape[1:]).transpose(1, 2)


def _spread(parts: list[tuple[Tensor | None, Tensor]], shape: tuple[int, ...], fill: float, like: Tensor) -> Tensor:
    """Parts (Tq, …) and their tokens -> (B * S, …), `fill` for tokens in no part."""
    if len(parts) == 1 and parts[0][0] is None:
        return parts[0][1]
    total = like.new_full(shape, fill)
    for rows, part in parts:
        assert rows is not None  # a call with all tokens is the only one
        total.index_copy_(0, rows, part)
    return total


def _take(tokens: Tensor, which: Tensor | None) -> Tensor:
    return tokens if which is None else tokens.index_select(0, which)


def _gather(call: Call, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _take(query, call.rows), _take(key, call.keys), _take(value, call.keys)


def _add_copies(total: Tensor, part: Tensor, call: Call) -> None:
    """Add gradients of repeated tokens up. Within one addition no token comes twice, so its order does not matter on any device."""
    if call.keys is None:
        total += part
    for which, tokens in call.copies:
        total.index_add_(0, tokens, part.index_select(0, which).to(total.dtype))
