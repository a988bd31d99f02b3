"""The row kernels of `linear_logprobs` in plain PyTorch: what one row of logits gives.

Triton and CUDA C++ have the same two functions; `row_chunks` makes the products before and after them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..logit_options import LogitOptions
from ..reference import linear_logprobs as reference


def fold(
    logits: Tensor,  # (R, V) hidden @ weight.T + bias
    targets: Tensor,  # (R,)
    options: LogitOptions,
    stats: tuple[str, ...],
) -> tuple[Tensor, dict[str, Tensor]]:
    """-> log-probabilities (R,) and statistics (R,) each, 0 where the target is ignored."""
    return reference.read_off(reference.logits_of(logits, options), targets, options, stats)


def fold_with_gradient(
    logits: Tensor, targets: Tensor, options: LogitOptions, stats: tuple[str, ...], coefficient_scale: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `fold`; `logits` become `coefficient_scale` times d log-probability / d (hidden @ weight.T + bias), in place.

    The target's own is 1 - p before anything is rounded. Near p = 1 it is summed over the other tokens, as the difference would lose it.
    """
    x = reference.logits_of(logits, options)
    found = reference.read_off(x, targets, options, stats)
    used = targets != options.ignore_index
    places = targets.where(used, 0)[:, None]
    grad = x.softmax(-1).neg_()
    own = -grad.gather(1, places)
    others = grad.scatter(1, places, 0.0).sum(-1, keepdim=True).neg_()
    grad.scatter_(1, places, torch.where(own < 0.5, 1.0 - own, others))
    if options.softcap is not None:
        grad *= 1.0 - (x * options.temperature / options.softcap) ** 2
    grad *= options.logit_scale / options.temperature * coefficient_scale
    logits.copy_(torch.where(used[:, None], grad, 0.0))
    return found
