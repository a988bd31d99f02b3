"""`preference_loss` in plain PyTorch: each loss a function of sequence log-probabilities, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def unavailable_reason(device_type: str, dtype: torch.dtype, **features: object) -> str | None:
    """None: the reference runs everywhere."""
    return None


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """All a loss may look at; every tensor is (B,)."""

    chosen: Tensor
    """log p(chosen) - log p_ref(chosen), summed over tokens."""
    rejected: Tensor
    """The same of the rejected response."""
    corrupted: Tensor | None
    """The same of the chosen response under the corrupted picture."""
    chosen_logps: Tensor
    """log p(chosen), summed over tokens."""
    chosen_lengths: Tensor
    """Tokens of the chosen response."""
    rejected_lengths: Tensor
    """Tokens of the rejected response."""
    beta: float
    anchor: float


def sigmoid(x: LossInputs) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7): -log sigmoid(beta (chosen - rejected)); log 2 at the reference."""
    return -logsigmoid(x.beta * (x.chosen - x.rejected))


def hinge(x: LossInputs) -> Tensor:
    """SLiC (arXiv 2305.10425): max(0, 1 - beta (chosen - rejected)); 1 at the reference."""
    return torch.relu(1 - x.beta * (x.chosen - x.rejected))


def ipo(x: LossInputs) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17) on per-token means: (chosen - rejected - 1 / (2 beta))^2; 1 / (4 beta^2) at the reference."""
    return (x.chosen / x.chosen_lengths - x.rejected / x.rejected_lengths - 1 / (2 * x.beta)) ** 2


def copo(x: LossInputs) -> Tensor:
    """mDPO's conditional term (arXiv 2406.11839, eq. 3): -log sigmoid(beta (chosen - corrupted)); log 2 at the reference."""
    assert x.corrupted is not None
    return -logsigmoid(x.beta * (x.chosen - x.corrupted))


def ancpo(x: LossInputs) -> Tensor:
    """mDPO's anchor (arXiv 2406.11839, eq. 4): -log sigmoid(beta chosen - anchor); log 2 at the reference with anchor 0."""
    return -logsigmoid(x.beta * x.chosen - x.anchor)


def nll(x: LossInputs) -> Tensor:
    """Negative log-likelihood of the chosen responses, mean over the batch's tokens (the gamma term of MIA-DPO)."""
    return (-x.chosen_logps.sum() / x.chosen_lengths.sum()).expand(x.chosen_logps.shape)


LOSSES: dict[str, Callable[[LossInputs], Tensor]] = {f.__name__: f for f in (sigmoid, hinge, ipo, copo, ancpo, nll)}
NEEDS_CORRUPTED = frozenset({"copo"})


def forward(inputs: LossInputs, loss_type: tuple[str, ...], loss_weights: tuple[float, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """-> weighted sum of the losses' batch means (scalar), and each loss per example (B,)."""
    losses = {name: LOSSES[name](inputs) for name in loss_type}
    total = sum(
        (weight * losses[name].mean() for name, weight in zip(loss_type, loss_weights, strict=True)),
        start=inputs.chosen.new_zeros(()),
    )
    return total, losses
