"""The loss of a backend that writes value and gradient in one go, as a tensor that autograd can differentiate once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..backends.loss_options import LossArrays, LossOptions, table_size
from ..backends.registry import load
from .loss_settings import OP, kept_settings


@functools.lru_cache(maxsize=8)
def _module(backend: str) -> ModuleType:
    """Kept, as to look a module up again takes longer than the loss."""
    return load(OP, backend)


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


def compiled_loss(backend: str, arrays: LossArrays, given: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """As `fused_loss`, in operators that `torch.compile` can have in its graph. given: the arguments of `settings`."""
    policy = arrays.policy
    wanted = policy.requires_grad and torch.is_grad_enabled()
    loss, gradient, table = preference_loss_op(
        policy.detach(),
        arrays.reference,
        arrays.reference_is_sums,
        arrays.lengths,
        arrays.weights,
        arrays.counts,
        arrays.branches,
        arrays.batch,
        *given,
        wanted,
        backend,
    )
    if not wanted:
        return loss, table
    product = torch.dot(policy, gradient)
    return loss + (product - product.detach()), table


@torch.library.custom_op(
    "mmdpo_kernels::preference_loss",
    mutates_args=(),
    schema="(Tensor policy, Tensor? reference, bool reference_is_sums, Tensor? lengths, Tensor? weights, Tensor? counts, str[] branches, "
    "SymInt batch, str[] names, float[]? loss_weights, float beta, float label_smoothing, float anchor, str[] anchors, float simpo_gamma, "
    "float bco_shift, bool length_normalised, bool wanted, str backend) -> (Tensor, Tensor, Tensor)",
)
def preference_loss_op(
    policy: Tensor,
    reference: Tensor | None,
    reference_is_sums: bool,
    lengths: Tensor | None,
    weights: Tensor | None,
    counts: Tensor | None,
    branches: Sequence[str],
    batch: int,
    names: Sequence[str],
    loss_weights: Sequence[float] | None,
    beta: float,
    label_smoothing: float,
    anchor: float,
    anchors: Sequence[str],
    simpo_gamma: float,
    bco_shift: float,
    length_normalised: bool,
    wanted: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`LossArrays` and the arguments of `settings` -> loss, gradient (empty unless wanted), table."""
    arrays = LossArrays(policy, reference, reference_is_sums, lengths, weights, counts, tuple(branches), batch)
    options = kept_settings(
        tuple(names),
        None if loss_weights is None else tuple(loss_weights),
        beta,
        label_smoothing,
        anchor,
        tuple(anchors),
        simpo_gamma,
        bco_shift,
        length_normalised,
    ).options
    loss, gradient, table = _empty(policy, len(set(names)), len(branches), batch, wanted)
    _module(backend).write(arrays, options, loss, gradient if wanted else None, table)
    return loss, gradient, table


@preference_loss_op.register_fake
def _(
    policy: Tensor,
    reference: Tensor | None,
    reference_is_sums: bool,
    lengths: Tensor | None,
    weights: Tensor | None,
    counts: Tensor | None,
    branches: Sequence[str],
    batch: int,
    names: Sequence[str],
    loss_weights: Sequence[float] | None,
    beta: float,
    label_smoothing: float,
    anchor: float,
    anchors: Sequence[str],
    simpo_gamma: float,
    bco_shift: float,
    length_normalised: bool,
    wanted: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(policy, len(set(names)), len(branches), batch, wanted)


def _empty(policy: Tensor, losses: int, branches: int, batch: int, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    table = policy.new_empty((table_size(losses, branches), batch))
    return policy.new_empty(()), policy.new_empty(policy.shape if wanted else (0,)), table


def _refuse_second_derivative(grads: tuple[Tensor | None, ...]) -> None:
    """To autograd, `gradient` is a constant: what it found for a second derivative would lack a term."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{OP}: only the backend 'reference' has a second derivative (create_graph=True)")
