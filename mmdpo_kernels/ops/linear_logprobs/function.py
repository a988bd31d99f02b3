"""`linear_logprobs`: log-probabilities of target tokens straight from hidden states, without T x V logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...backends.logit_options import STATS
from ..checks import check_positive, check_tensor
from ..precision import autocast_to
from .autograd import HIDDEN, HIDDEN_AND_HEAD, NONE, head_logprobs

OP = "linear_logprobs"


@dataclass(frozen=True, kw_only=True)
class LogProbs:
    """What `linear_logprobs` returns; statistics that were not asked for are None and carry no gradient."""

    logps: Tensor
    """(T,) float32 (float64 for float64 inputs): log p(target), 0 where ignored."""
    reference_logps: Tensor | None = None
    """(T',) the same for `reference_hidden`, without a gradient."""
    entropy: Tensor | None = None
    """(T,) entropy of the distribution, nats."""
    max_logp: Tensor | None = None
    """(T,) log-probability of the likeliest token."""
    is_top1: Tensor | None = None
    """(T,) 1.0 where the target is the likeliest token."""
    mean_logit: Tensor | None = None
    """(T,) mean logit over the vocabulary."""


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
    reference_hidden: Tensor | None = None,  # (T', H)
    reference_targets: Tensor | None = None,  # (T',)
    kept_bytes: int = 1 << 30,
    backend: str = "auto",
) -> LogProbs:
    """Log-probability of each row's target token under a linear head.

    Equivalent PyTorch::

        logits = (hidden @ weight.T + bias).float() * logit_scale
        logits = softcap * tanh(logits / softcap) / temperature
        logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    With u = 2 T H V floating-point operations, forward and backward together take 2u with a frozen head, whatever the upstream gradient;
    3u with a trained one whose logit gradients fit `kept_bytes`, 4u above; 1u without a gradient.

    Args:
        hidden: (T, H), rows that predict a target.
        weight: (V, H), same dtype; under autocast both are cast to its dtype, as `torch.nn.Linear` casts them.
        targets: (T,) int64 in [0, V), or `ignore_index`.
        bias: (V,), same dtype. Without a softcap, a token that cannot come has -inf here.
        softcap: c in `c tanh(logits / c)`, after `logit_scale`.
        logit_scale: factor on the logits.
        temperature: divisor of the logits, after the softcap.
        ignore_index: targets with this value give 0 and no gradient.
        stats: any of "entropy", "max_logp", "is_top1", "mean_logit", from the same pass over the logits.
        reference_hidden: (T', H), the reference model's rows where it has the same head: scored in the same products as the policy's,
            without a gradient.
        reference_targets: (T',), their targets; None: `targets`.
        kept_bytes: most memory that a trained head may keep from forward to backward.
        backend: "auto", or a name from `backends()["linear_logprobs"]`. "reference" alone holds T x V.

    Returns:
        `LogProbs`; `logps` is differentiable in hidden, weight and bias with any per-token upstream gradient, once.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or device, or, on the CPU, a target outside the vocabulary; on a GPU
            such a target makes its row NaN.
    """
    cast, reference_targets = _cast(hidden, weight, targets, bias, reference_hidden, reference_targets)
    check_positive(OP, softcap=softcap, temperature=temperature)
    unknown = [name for name in stats if name not in STATS]
    if unknown:
        raise ValueError(f"{OP}: stats must be among {', '.join(STATS)}, got {', '.join(map(repr, unknown))}")
    if kept_bytes < 0:
        raise ValueError(f"{OP}: kept_bytes must be 0 or more, got {kept_bytes}")
    logps, *extra = head_logprobs(
        cast["hidden"],
        cast.get("reference_hidden"),
        cast["weight"],
        cast.get("bias"),
        targets.long(),
        None if reference_targets is None else reference_targets.long(),
        softcap,
        float(logit_scale),
        float(temperature),
        ignore_index,
        ",".join(stats),
        backend,
        _gradient(cast["hidden"], cast["weight"], cast.get("bias")),
        kept_bytes,
    )
    # What follows the statistics is kept for backward.
    found = {name: values.detach() for name, values in zip(stats, extra, strict=False)}
    if reference_hidden is None:
        return LogProbs(logps=logps, **found)
    rows = hidden.shape[0]
    found = {name: values[:rows] for name, values in found.items()}
    return LogProbs(logps=logps[:rows], reference_logps=logps.detach()[rows:], **found)


def _cast(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    reference_hidden: Tensor | None,
    reference_targets: Tensor | None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """-> the floating tensors that are given, by name and in one dtype, and the targets of the reference; all checked."""
    check_tensor(OP, "hidden", hidden, ("T", "H"), floating=True)
    check_tensor(OP, "weight", weight, ("V", hidden.shape[1]), floating=True)
    check_tensor(OP, "targets", targets, (hidden.shape[0],), floating=False)
    if weight.shape[0] == 0:
        raise ValueError(f"{OP}: weight must have at least one row, got shape {tuple(weight.shape)}")
    if bias is not None:
        check_tensor(OP, "bias", bias, (weight.shape[0],), floating=True)
    if reference_hidden is not None:
        check_tensor(OP, "reference_hidden", reference_hidden, ("T'", hidden.shape[1]), floating=True)
        reference_targets = targets if reference_targets is None else reference_targets
        check_tensor(OP, "reference_targets", reference_targets, (reference_hidden.shape[0],), floating=False)
    elif reference_targets is not None:
        raise ValueError(f"{OP}: reference_targets need reference_hidden, got None")
    given = {"hidden": hidden, "weight": weight, "bias": bias, "reference_hidden": reference_hidden}
    present = [name for name, tensor in given.items() if tensor is not None]
    cast = dict(zip(present, autocast_to(*(given[name] for name in present)), strict=True))  # type: ignore[arg-type]
    for name, tensor in cast.items():
        if tensor.dtype != cast["hidden"].dtype:
            raise TypeError(f"{OP}: hidden and {name} must have one dtype, got {cast['hidden'].dtype} and {tensor.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{OP}: {name} must be on the device of hidden, {hidden.device}, got {tensor.device}")
    for name, values in (("targets", targets), ("reference_targets", reference_targets)):
        if values is not None and values.device != hidden.device:
            raise ValueError(f"{OP}: {name} must be on the device of hidden, {hidden.device}, got {values.device}")
    return cast, reference_targets


def _gradient(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """What will be differentiated in."""
    if not torch.is_grad_enabled():
        return NONE
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return HIDDEN_AND_HEAD
    return HIDDEN if hidden.requires_grad else NONE
