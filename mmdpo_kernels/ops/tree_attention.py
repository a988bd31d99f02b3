"""`tree_attention`: attention in which query i sees key j iff `j <= i < tree_end[j]`, or with `reach` iff `j < reach[i]`, `i < tree_end[j]`."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends.calls import TreeAttentionCall
from ..backends.layout import accumulation_dtype
from ..backends.reference import tree_attention as reference
from ..backends.registry import resolve
from ..op_names import add_op_namespace_prefix
from .checks import (
    check_devices,
    check_heads,
    check_positive,
    check_reach,
    check_segments,
    check_tensor,
    check_tree_end,
    default_scale,
    grad_or_none,
)
from .flat import schema_of, tensors_and_rest, with_tensors
from .precision import autocast_off, without_autocast

OP = "tree_attention"

# Kernels want head dims that are multiples of 8.
_COLUMNS = 8
# The 24 bits of a float32 in three bfloat16 of 8.
_PARTS = 3
# Of the powers of two that float16 holds in full.
_EXPONENTS = -14, 15


class TreeAttentionOutput(NamedTuple):
    """What `tree_attention` returns."""

    output: Tensor
    """(B, Hq, S, Dv), the query's dtype; zeros where a query sees no key."""
    lse: Tensor
    """(B, Hq, S), float32 (float64 for float64 inputs), natural log; -inf where a query sees no key."""
    mass: Tensor
    """(B, Hq, S, num_segments), dtype of lse: attention probability on each segment."""


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: TreeAttentionCall,
        backend: ModuleType,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        query, key, value = _dense(query, key, value)
        output, lse, mass = backend.forward(query, key, value, call)
        tensors, ctx.call = tensors_and_rest(call)
        ctx.save_for_backward(query, key, value, output, lse, *tensors)
        ctx.backend = backend
        return output, lse, mass

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse, *tensors = ctx.saved_tensors
        call = with_tensors(ctx.call, tensors)
        found = _backward_of(ctx.backend, tuple(map(grad_or_none, grads)), query, key, value, output, lse, call)
        return *found, None, None


def _dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Kernels read each head vector as consecutive elements."""
    return tuple(tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors)


def _backward_through_lse(
    backend: ModuleType,
    grad_output: Tensor | None,
    grad_lse: Tensor,  # (B, Hq, S)
    grad_mass: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    call: TreeAttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of a backend that takes no gradient of the log-sum-exp, made to take one.

    Such a backward computes dscores = P (dP - rowsum(dO output)), and the gradient of lse belongs in the bracket. It gets there by columns
    where query, key and value are zero, so that they change nothing else, and where dO output is -dlse: in parts that the dtype holds, times
    a power of two that float16 has too. Where the kernel has no room for more columns, the reference does the backward.
    """
    dim = query.shape[-1]
    features = {
        "head_dim": dim + _COLUMNS,
        "softcap": call.softcap is not None,
        "window": call.window is not None,
        "reach": call.reach is not None,
    }
    if backend.unavailable_reason(query.device.type, query.dtype, **features) is not None:
        return reference.backward(grad_output, grad_lse, grad_mass, query, key, value, output, lse, call)
    exponent = torch.frexp(grad_lse).exponent.clamp(*_EXPONENTS)
    powers = torch.ldexp(torch.ones_like(grad_lse), exponent)
    left, parts = -grad_lse / powers, []
    for _ in range(_PARTS):
        parts.append(left.to(query.dtype))
        left = left - parts[-1].to(left.dtype)

    def widened(tensor: Tensor, columns: list[Tensor]) -> Tensor:
        wider = tensor.new_zeros(*tensor.shape[:-1], dim + _COLUMNS)
        wider[..., :dim] = tensor
        for number, column in enumerate(columns):
            wider[..., dim + number] = column
        return wider

    grads: tuple[Tensor, ...] = backend.backward(
        widened(torch.zeros_like(output) if grad_output is None else grad_output, parts),
        None,
        grad_mass,
        *(widened(tensor, []) for tensor in (query, key, value)),
        widened(output, [powers.to(query.dtype)] * _PARTS),
        lse,
        call,
    )
    grad_query, grad_key, grad_value = (grad[..., :dim] for grad in grads)
    return grad_query, grad_key, grad_value


def tree_attention(
    query: Tensor,  # (B, Hq, S, D)
    key: Tensor,  # (B, Hkv, S, D)
    value: Tensor,  # (B, Hkv, S, Dv)
    tree_end: Tensor | None = None,  # (B, S)
    *,
    reach: Tensor | None = None,  # (B, S)
    segments: Tensor | None = None,  # (B, S)
    num_segments: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> TreeAttentionOutput:
    """Attention over a token tree, with the log-sum-exp and the attention mass on token segments.

    Equivalent PyTorch, for Hq = Hkv and with `seen = (j <= i) & (i < tree_end[:, None, :])`, or with reach
    `seen = (j < reach[..., None]) & (i < tree_end[:, None, :])`::

        scores = (scale * query @ key.mT).masked_fill(~seen[:, None], -inf)
        lse = scores.logsumexp(-1)
        output = scores.softmax(-1) @ value
        mass = scores.softmax(-1) @ one_hot(segments)

    Args:
        query: (B, Hq, S, D), any floating dtype. Hq is a multiple of Hkv.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        tree_end: (B, S) integer; packed index where the subtree of the token's node ends. None is causal attention. Hidden and padded
            tokens: their own index or 0, with reach 0; or `-1 - end`, hidden tokens that keep their place under a window.
        reach: (B, S) integer; how far each query looks ahead: up to the packed index `reach[i]`, exclusive, such as the end of a picture for
            each of its tokens, the end of the prefix for a prefix-LM, and `i + 1` for text. At least `i + 1` for tokens that are seen, which
            is looked at on the CPU. That it ends within the token's own node is the caller's to see to: past it lie the tokens of the first
            branch. None: `i + 1`.
        segments: (B, S) integer; the segment of each key, -1 for none.
        num_segments: number of segments.
        scale: factor on the scores, default `D ** -0.5`.
        softcap: c in `c tanh(scores / c)`.
        window: a query sees at most this many tokens back along its own path, itself included; what it looks ahead to is not bounded.
        backend: "auto", or a name from `backends()["tree_attention"]`.

    Returns:
        `TreeAttentionOutput(output, lse, mass)`, differentiable in query, key and value through all three. Where PyTorch's or another
        library's kernel serves the call, a gradient through lse costs a copy of the inputs.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or shape, or a named backend that cannot serve the call.
    """
    check_tensor(OP, "query", query, ("B", "Hq", "S", "D"), floating=True)
    batch, _, length, dim = query.shape
    check_tensor(OP, "key", key, (batch, "Hkv", length, dim), floating=True)
    check_tensor(OP, "value", value, (batch, key.shape[1], length, "Dv"), floating=True)
    check_heads(OP, query, key)
    if value.dtype != query.dtype:
        raise TypeError(f"{OP}: query and value must have one dtype, got {query.dtype} and {value.dtype}")
    check_devices(OP, query, value=value, tree_end=tree_end, reach=reach, segments=segments)
    check_tree_end(OP, tree_end, batch, length)
    check_reach(OP, reach, tree_end, batch, length)
    check_segments(OP, segments, num_segments, batch, length)
    check_positive(OP, softcap=softcap, window=window)
    call = TreeAttentionCall(
        tree_end=tree_end,
        segments=segments,
        num_segments=num_segments,
        scale=default_scale(scale, dim),
        softcap=softcap,
        window=window,
        reach=reach,
    )
    gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    if torch.compiler.is_compiling():
        call = call._replace(tree_end=own_tree(tree_end), reach=own_tree(reach))
        return TreeAttentionOutput(*attention_op(query, key, value, *call, backend, gradient))
    module = _resolve(backend, query, value, call, gradient)
    return TreeAttentionOutput(*_TreeAttention.apply(query, key, value, call, module))


def _resolve(backend: str, query: Tensor, value: Tensor, call: TreeAttentionCall, gradient: bool) -> ModuleType:
    """The module that serves a call."""
    dim, value_dim = query.shape[-1], value.shape[-1]
    return resolve(
        OP,
        backend,
        query.device,
        query.dtype,
        softcap=call.softcap is not None,
        window=call.window is not None,
        mass=call.num_segments > 0,
        value_dim=value_dim != dim,
        head_dim=max(dim, value_dim),
        length=query.shape[2],
        tree=call.tree_end is not None,
        reach=call.reach is not None,
        gradient=gradient,
    )


def own_tree(tree: Tensor | None) -> Tensor | None:
    """A copy of `tree_end` or `reach` that no other tensor of compiled code is written over: what is derived is kept while they live."""
    return None if tree is None else own_tree_op(tree)


@torch.library.custom_op(add_op_namespace_prefix("own_tree"), mutates_args=())
def own_tree_op(tree_end: Tensor) -> Tensor:
    """-> a tensor that the operator allocates, and not the memory plan of compiled code."""
    return tree_end.contiguous().clone()


@own_tree_op.register_fake
def _(tree_end: Tensor) -> Tensor:
    return tree_end.new_empty(tree_end.shape)


@torch.library.custom_op(
    add_op_namespace_prefix("tree_attention"),
    mutates_args=(),
    tags=(torch.Tag.cudagraph_unsafe,),
    schema=f"(Tensor query, Tensor key, Tensor value, {schema_of(TreeAttentionCall)}, str backend, bool gradient)"
    " -> (Tensor, Tensor, Tensor)",
)
def attention_op(
    query: Tensor,  # (B, Hq, S, D)
    key: Tensor,  # (B, Hkv, S, D)
    value: Tensor,  # (B, Hkv, S, Dv)
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`tree_attention` as an operator, so that `torch.compile` has it in its graph.

    rest: the fields of the call, the backend, and whether there will be a backward.
    """
    *fields, backend, gradient = rest
    call = TreeAttentionCall(*fields)
    check_segments(OP, call.segments, call.num_segments, query.shape[0], query.shape[2])
    check_reach(OP, call.reach, call.tree_end, query.shape[0], query.shape[2])
    module = _resolve(backend, query, value, call, gradient)
    query, key, value = _dense(query, key, value)
    with autocast_off(query.device.type):
        output, lse, mass = module.forward(query, key, value, call)
    return output.contiguous(), lse.contiguous(), mass.contiguous()


@attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fields, _, _ = rest
    rows = query.shape[:3]
    wide = accumulation_dtype(query.dtype)
    return (
        query.new_empty((*rows, value.shape[3])),
        query.new_empty(rows, dtype=wide),
        query.new_empty((*rows, TreeAttentionCall(*fields).num_segments), dtype=wide),
    )


@torch.library.custom_op(
    add_op_namespace_prefix("tree_attention_backward"),
    mutates_args=(),
    tags=(torch.Tag.cudagraph_unsafe,),
    schema="(Tensor? grad_output, Tensor? grad_lse, Tensor? grad_mass, Tensor query, Tensor key, Tensor value, Tensor output, Tensor lse, "
    f"{schema_of(TreeAttentionCall)}, str backend) -> (Tensor, Tensor, Tensor)",
)
def attention_backward_op(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    grad_mass: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> the gradients of query, key and value. rest: the fields of the call, and the backend."""
    *fields, backend = rest
    call = TreeAttentionCall(*fields)
    module = _resolve(backend, query, value, call, True)
    query, key, value = _dense(query, key, value)
    with autocast_off(query.device.type):
        grads = tuple(grad_or_none(grad) for grad in (grad_output, grad_lse, grad_mass))
        found = _backward_of(module, grads, query, key, value, output, lse, call)
    return tuple(grad.contiguous() for grad in found)  # type: ignore[return-value]


@attention_backward_op.register_fake
def _(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    grad_mass: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, *fields, ctx.backend, _ = inputs
    ctx.set_materialize_grads(False)
    tensors, ctx.call = tensors_and_rest(TreeAttentionCall(*fields))
    ctx.save_for_backward(query, key, value, *output[:2], *tensors)


def _op_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{OP}: it has a first derivative only, backward was asked for with create_graph=True")
    query, key, value, output, lse, *tensors = ctx.saved_tensors
    call = with_tensors(ctx.call, tensors)
    found = attention_backward_op(*grads, query, key, value, output, lse, *call, ctx.backend)
    return *found, *[None] * (len(call) + 2)


attention_op.register_autograd(_op_backward, setup_context=_setup_context)


def _backward_of(
    backend: ModuleType,
    grads: tuple[Tensor | None, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    call: TreeAttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, from those of output, lse and mass."""
    backward = backend.backward
    if grads[1] is not None and not backend.LSE_GRADIENT:
        backward = partial(_backward_through_lse, backend)
    found: tuple[Tensor, Tensor, Tensor] = backward(*grads, query, key, value, output, lse, call)
    return found
