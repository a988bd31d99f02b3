"""`linear_logprobs` as PyTorch operators with a gradient, so that `torch.compile` has them in its graph.

The operator `linear_logprobs` gives the log-probabilities, the statistics, and what backward needs; its backward multiplies, or calls
`linear_logprobs_backward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...backends.layout import accumulation_dtype
from ...backends.logit_options import LogitOptions
from ...backends.registry import resolve
from ...op_names import add_op_namespace_prefix
from ..flat import schema_of
from ..precision import autocast_off

OP = "linear_logprobs"

NONE, HIDDEN, HIDDEN_AND_HEAD = range(3)
"""What will be differentiated in. HIDDEN: the head is frozen."""


@torch.library.custom_op(
    add_op_namespace_prefix("linear_logprobs"),
    mutates_args=(),
    schema="(Tensor hidden, Tensor? reference_hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? reference_targets, "
    f"{schema_of(LogitOptions)}, str stats, str backend, SymInt gradient, SymInt kept_bytes) -> Tensor[]",
)
def head_logprobs(
    hidden: Tensor,  # (T, H)
    reference_hidden: Tensor | None,  # (T', H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (T,)
    reference_targets: Tensor | None,  # (T',)
    *rest: Any,
) -> list[Tensor]:
    """-> log-probabilities (T + T',), each statistic (T + T',), then what backward needs:

    nothing, where it makes the logits again; d log-probability / d hidden (T, H), where it multiplies; and after this what the backend
    keeps of a trained head. rest: `LogitOptions`, field by field, and what the schema says after them.
    """
    *fields, stats, backend, gradient, kept_bytes = rest
    options = LogitOptions(*fields)
    module = resolve(OP, backend, hidden.device, hidden.dtype)
    names = _names(stats)
    kept = _kept(module, gradient, hidden, weight, kept_bytes)
    _check_targets("targets", targets, weight.shape[0], options.ignore_index)
    parts = [(hidden, targets)]
    if reference_hidden is not None and reference_targets is not None:
        _check_targets("reference_targets", reference_targets, weight.shape[0], options.ignore_index)
        parts.append((reference_hidden, reference_targets))
    # What a trained head keeps is of its own rows; all others go through the head together.
    apart = kept or len(parts) == 1
    joined = parts if apart else [(torch.cat([rows for rows, _ in parts]), torch.cat([wanted for _, wanted in parts]))]
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    left: list[Tensor] = []
    with autocast_off(hidden.device.type):
        for rows, wanted in joined:
            if found or kept is None:
                found.append(module.forward(rows, weight, wanted, bias, options, names))
                continue
            logps, values, grad = module.forward_with_gradient(
                rows, weight, wanted, bias, options, names, hidden.shape[0], kept or None
            )
            found.append((logps, values))
            left = [grad, *kept]
    return [
        torch.cat([logps for logps, _ in found]),
        *(torch.cat([values[name] for _, values in found]) for name in names),
        *left,
    ]


@head_logprobs.register_fake
def _(hidden: Tensor, reference_hidden: Tensor | None, weight: Tensor, *rest: Any) -> list[Tensor]:
    *_, stats, backend, gradient, kept_bytes = rest
    count = hidden.shape[0] + (0 if reference_hidden is None else reference_hidden.shape[0])
    wide = accumulation_dtype(hidden.dtype)
    found = [hidden.new_empty(count, dtype=wide) for _ in range(1 + len(_names(stats)))]
    kept = _kept(resolve(OP, backend, hidden.device, hidden.dtype), gradient, hidden, weight, kept_bytes)
    if gradient == NONE or kept is None:
        return found
    return [*found, hidden.new_empty(hidden.shape, dtype=wide), *kept]


@torch.library.custom_op(
    add_op_namespace_prefix("linear_logprobs_backward"),
    mutates_args=(),
    schema="(Tensor grad_logps, Tensor[] kept, Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, "
    f"{schema_of(LogitOptions)}, str backend, bool[] needs) -> Tensor[]",
)
def head_logprobs_backward(
    grad_logps: Tensor,  # (T,)
    kept: Sequence[Tensor],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *rest: Any,
) -> list[Tensor]:
    """-> the gradients of hidden, weight and bias that `needs` names, in their dtypes; hidden's is not made from `kept`."""
    *fields, backend, needs = rest
    options = LogitOptions(*fields)
    module = resolve(OP, backend, hidden.device, hidden.dtype)
    wanted = (needs[0], needs[1], needs[2])
    with autocast_off(hidden.device.type):
        if kept:
            grads = module.backward_kept(grad_logps, list(kept), hidden, weight, targets, options, wanted)
        else:
            grads = module.backward(grad_logps, hidden, weight, targets, bias, options, wanted)
    return [grad.to(hidden.dtype) for grad in grads if grad is not None]


@head_logprobs_backward.register_fake
def _(
    grad_logps: Tensor, kept: Sequence[Tensor], hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> list[Tensor]:
    tensors, needs = (hidden, weight, bias), rest[-1]
    return [torch.empty_like(tensor) for tensor, needed in zip(tensors, needs, strict=True) if tensor is not None and needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, reference_hidden, weight, bias, targets, _, *fields, stats, backend, gradient, _ = inputs
    saved = output[1 + len(_names(stats)) :]
    # A frozen head's backward needs its weight no more.
    remembered = (None, None, None) if saved and gradient == HIDDEN else (hidden, weight, bias)
    ctx.save_for_backward(*remembered, targets, *saved)
    # The coefficients that are kept are an output too: zeros for their gradient would be as large.
    ctx.set_materialize_grads(False)
    ctx.options, ctx.backend, ctx.rows, ctx.dtype = LogitOptions(*fields), backend, hidden.shape[0], hidden.dtype


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{OP}: it has a first derivative only, backward was asked for with create_graph=True")
    hidden, weight, bias, targets, *saved = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]]
    found: list[Tensor | None] = [None, None, None]
    if grads[0] is not None:
        # An ignored row has no gradient, whatever comes from above: 0 times a NaN would be one.
        used = targets != ctx.options.ignore_index
        grad_logps = grads[0][: ctx.rows].where(used, 0.0).contiguous()
        if saved:
            if needs[0]:
                found[0] = (grad_logps[:, None] * saved[0]).to(ctx.dtype)
            needs[0] = False
        if any(needs):
            made = head_logprobs_backward(grad_logps, saved[1:], hidden, weight, bias, targets, *ctx.options, ctx.backend, needs)
            for place in reversed([place for place, needed in enumerate(needs) if needed]):
                found[place] = made.pop()
    return found[0], None, found[1], found[2], *[None] * 10


head_logprobs.register_autograd(_backward, setup_context=_setup_context)


def _check_targets(name: str, targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    # On a GPU this would wait for the device; there a row with such a target is NaN.
    if targets.device.type != "cpu":
        return
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))
    if bool(bad.any()):
        raise ValueError(f"{OP}: {name} must be in [0, {vocabulary}) or {ignore_index}, got {int(targets[bad][0])}")


def _names(stats: str) -> tuple[str, ...]:
    return tuple(name for name in stats.split(",") if name)


def _kept(module: ModuleType, gradient: int, hidden: Tensor, weight: Tensor, most_bytes: int) -> list[Tensor] | None:
    """Room for what forward leaves to backward beside the gradient of the rows; None: it leaves nothing, the logits are made again."""
    if gradient == NONE or not hasattr(module, "forward_with_gradient"):
        return None
    if gradient == HIDDEN:
        return []
    if hidden.shape[0] * weight.shape[0] * hidden.element_size() > most_bytes:
        return None
    kept: list[Tensor] = module.empty_kept(hidden, weight)
    return kept
