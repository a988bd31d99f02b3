"""The loss of a backend that writes value and gradient in one go, as a tensor that autograd can differentiate once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...backends.loss_options import LossArrays, LossOptions, table_size
from ...backends.registry import load, resolve
from ...losses import LossParameters
from ...op_names import add_op_namespace_prefix
from ..flat import schema_of
from .settings import OP, LossRequest, kept_settings

_ARRAYS = len(LossArrays._fields)


@functools.lru_cache(maxsize=8)
def _module(backend: str) -> ModuleType:
    """Kept, as to look a module up again takes longer than the loss."""
    return load(OP, backend)


def backend_of(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that serves such calls."""
    return resolve(OP, backend, device, dtype).__name__.split(".")[-2]


kept_backend = functools.lru_cache(maxsize=64)(backend_of)


def fused_loss(backend: str, arrays: LossArrays, options: LossOptions) -> tuple[Tensor, Tensor]:
    """-> loss () with its gradient in `arrays.policy`, and the table."""
    policy = arrays.policy
    table = policy.new_empty((table_size(len(options.names), len(arrays.branches)), arrays.batch))
    value = policy.new_empty(())
    if not (policy.requires_grad and torch.is_grad_enabled()):
        _module(backend).write(arrays, options, value, None, table)
        return value, table
    gradient = policy.new_empty(policy.shape)
    # First the kernel: hooks on saved tensors, such as those that offload them, copy `gradient` as soon as the product is made.
    _module(backend).write(arrays, options, value, gradient, table)
    # The derivative of a dot product is the very one that is wanted, upstream times `gradient`, and costs less than an autograd
    # function in Python. Of its operands it keeps `gradient` alone; its value, which nothing looks at, gives way to the loss.
    loss = torch.dot(policy, gradient)
    loss.data = value
    loss.grad_fn.register_prehook(_refuse_second_derivative)  # type: ignore[union-attr]
    return loss, table


def compiled_loss(backend: str, arrays: LossArrays, request: LossRequest) -> tuple[Tensor, Tensor]:
    """As `fused_loss`, in operators that `torch.compile` can have in its graph."""
    policy = arrays.policy
    wanted = policy.requires_grad and torch.is_grad_enabled()
    loss, gradient, table = preference_loss_op(
        *arrays._replace(policy=policy.detach()),
        request.names,
        request.weights,
        *request.parameters,
        request.length_normalised,
        wanted,
        backend,
    )
    if not wanted:
        return loss, table
    product = torch.dot(policy, gradient)
    return loss + (product - product.detach()), table


@torch.library.custom_op(
    add_op_namespace_prefix("preference_loss"),
    mutates_args=(),
    schema=f"({schema_of(LossArrays)}, str[] names, float[]? loss_weights, {schema_of(LossParameters)}, bool length_normalised, "
    "bool wanted, str backend) -> (Tensor, Tensor, Tensor)",
)
def preference_loss_op(policy: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`LossArrays` and `LossRequest`, field by field -> loss, gradient (empty unless wanted), table."""
    arrays, request, wanted, backend = _parts(policy, *rest)
    options = kept_settings(request).options
    loss, gradient, table = _empty(arrays, request, wanted)
    _module(backend).write(arrays, options, loss, gradient if wanted else None, table)
    return loss, gradient, table


@preference_loss_op.register_fake
def _(policy: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    arrays, request, wanted, _ = _parts(policy, *rest)
    return _empty(arrays, request, wanted)


def _parts(*flat: Any) -> tuple[LossArrays, LossRequest, bool, str]:
    """What `compiled_loss` has taken apart; PyTorch hands lists over for tuples."""
    values: list[Any] = [tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value for value in flat]
    arrays, (names, weights, *parameters, length_normalised, wanted, backend) = values[:_ARRAYS], values[_ARRAYS:]
    return LossArrays(*arrays), LossRequest(names, weights, LossParameters(*parameters), length_normalised), wanted, backend


def _empty(arrays: LossArrays, request: LossRequest, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    policy = arrays.policy
    table = policy.new_empty((table_size(len(set(request.names)), len(arrays.branches)), arrays.batch))
    return policy.new_empty(()), policy.new_empty(policy.shape if wanted else (0,)), table


def _refuse_second_derivative(grads: tuple[Tensor | None, ...]) -> None:
    """To autograd, `gradient` is a constant: what it found for a second derivative would lack a term."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{OP}: only the backend 'reference' has a second derivative (create_graph=True)")
