"""`linear_logprobs`: log-probabilities of target tokens straight from hidden states, without T x V logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends.registry import resolve
from .checks import check_positive, check_tensor
from .precision import without_autocast

OP = "linear_logprobs"
STATS = ("entropy", "max_logp", "is_top1", "mean_logit")


@dataclass(frozen=True, kw_only=True)
class LogProbs:
    """What `linear_logprobs` returns; statistics that were not asked for are None and carry no gradient."""

    logps: Tensor
    """(T,) float32 (float64 for float64 inputs): log p(target), 0 where ignored."""
    entropy: Tensor | None = None
    """(T,) entropy of the distribution, nats."""
    max_logp: Tensor | None = None
    """(T,) log-probability of the likeliest token."""
    is_top1: Tensor | None = None
    """(T,) 1.0 where the target is the likeliest token."""
    mean_logit: Tensor | None = None
    """(T,) mean logit over the vocabulary."""


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: tuple[Any, ...],
        stats: tuple[str, ...],
        backend: ModuleType,
        early: bool,
    ) -> tuple[Tensor, ...]:
        ctx.early = early
        if early:
            logps, found, gradient = backend.forward_with_gradient(hidden, weight, targets, bias, *options, stats)
            ctx.save_for_backward(gradient)
        else:
            logps, found = backend.forward(hidden, weight, targets, bias, *options, stats)
            ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.options, ctx.backend = options, backend
        extra = tuple(found[name] for name in stats)
        ctx.mark_non_differentiable(*extra)
        return logps, *extra

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_logps: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.early:
            (gradient,) = ctx.saved_tensors
            return (grad_logps[:, None] * gradient).to(gradient.dtype), *[None] * 7
        hidden, weight, bias, targets = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        grads = ctx.backend.backward(grad_logps, hidden, weight, targets, bias, *ctx.options, needs)
        inputs = (hidden, weight, bias)
        cast = (None if grad is None else grad.to(tensor.dtype) for grad, tensor in zip(grads, inputs, strict=True))
        return *cast, *[None] * 5


def linear_logprobs(
    hidden: Tensor,  # (T, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (T,)
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    stats: Sequence[str] = (),
    backend: str = "auto",
) -> LogProbs:
    """Log-probability of each row's target token under a linear head.

    Equivalent PyTorch::

        logits = (hidden @ weight.T + bias).float() * logit_scale
        logits = softcap * tanh(logits / softcap) / temperature
        logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    Args:
        hidden: (T, H), rows that predict a target.
        weight: (V, H), same dtype.
        targets: (T,) int64 in [0, V), or `ignore_index`.
        bias: (V,).
        softcap: c in `c tanh(logits / c)`, after `logit_scale`.
        logit_scale: factor on the logits.
        temperature: divisor of the logits, after the softcap.
        ignore_index: targets with this value give 0 and no gradient.
        stats: any of "entropy", "max_logp", "is_top1", "mean_logit".
        backend: "auto", or a name from `backends()["linear_logprobs"]`. "chunked" never holds T x V.

    Returns:
        `LogProbs`; `logps` is differentiable in hidden, weight and bias with any per-token upstream gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or shape, or a target outside the vocabulary.
    """
    check_tensor(OP, "hidden", hidden, ("T", "H"), floating=True)
    check_tensor(OP, "weight", weight, ("V", hidden.shape[1]), floating=True)
    check_tensor(OP, "targets", targets, (hidden.shape[0],), floating=False)
    if hidden.dtype != weight.dtype:
        raise TypeError(f"{OP}: hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}")
    if bias is not None:
        check_tensor(OP, "bias", bias, (weight.shape[0],), floating=True)
        if bias.dtype != weight.dtype:
            raise TypeError(f"{OP}: weight and bias must have one dtype, got {weight.dtype} and {bias.dtype}")
    if weight.shape[0] == 0:
        raise ValueError(f"{OP}: weight must have at least one row, got shape {tuple(weight.shape)}")
    check_positive(OP, softcap=softcap, temperature=temperature)
    unknown = [name for name in stats if name not in STATS]
    if unknown:
        raise ValueError(f"{OP}: stats must be among {', '.join(STATS)}, got {', '.join(map(repr, unknown))}")
    _check_targets(targets, weight.shape[0], ignore_index)
    module = resolve(OP, backend, hidden.device, hidden.dtype)
    options = (softcap, float(logit_scale), float(temperature), ignore_index)
    # With a frozen head a row's gradient is known up to a factor as soon as its logits are.
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    # float16 needs the upstream gradient's loss scale before it is rounded to.
    early = (
        frozen
        and hidden.dtype != torch.float16
        and hidden.requires_grad
        and torch.is_grad_enabled()
        and hasattr(module, "forward_with_gradient")
    )
    logps, *extra = _LinearLogProbs.apply(hidden, weight, bias, targets.long(), options, tuple(stats), module, early)
    return LogProbs(logps=logps, **dict(zip(stats, extra, strict=True)))


def _check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    # On a GPU this would wait for the device; there the gather itself fails.
    if targets.device.type != "cpu":
        return
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))
    if bool(bad.any()):
        raise ValueError(f"{OP}: targets must be in [0, {vocabulary}) or {ignore_index}, got {int(targets[bad][0])}")
