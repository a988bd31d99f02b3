"""`preference_loss` in plain PyTorch: each loss a function of sequence log-probabilities, differentiated by autograd.

In the equations w, l and c are `log p - log p_ref` of the chosen response, of the rejected one, and of the chosen one under the
corrupted picture, summed over tokens (`length_normalised`: their means over tokens); logp are the policy's own log-probabilities.
"At the reference" is where policy and reference are the same model, so that w = l = c = 0.
"""

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
    """w: log p(chosen) - log p_ref(chosen)."""
    rejected: Tensor
    """l: the same of the rejected response."""
    corrupted: Tensor | None
    """c: the same of the chosen response under the corrupted picture."""
    chosen_means: Tensor
    """w as a mean over tokens, whether or not the others are."""
    rejected_means: Tensor
    """l as a mean over tokens."""
    chosen_logps: Tensor
    """log p(chosen), summed over tokens."""
    rejected_logps: Tensor
    """log p(rejected), summed over tokens."""
    chosen_lengths: Tensor
    """Tokens of the chosen response."""
    rejected_lengths: Tensor
    """Tokens of the rejected response."""
    beta: float
    label_smoothing: float
    anchor: float
    anchors: tuple[str, ...]
    simpo_gamma: float
    bco_shift: float


def sigmoid(x: LossInputs) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7): -log sigmoid(beta (w - l)). log 2 at the reference."""
    return -logsigmoid(x.beta * (x.chosen - x.rejected))


def hinge(x: LossInputs) -> Tensor:
    """SLiC (arXiv 2305.10425; on log-ratios as in arXiv 2309.06657): max(0, 1 - beta (w - l)). 1 at the reference."""
    return torch.relu(1 - x.beta * (x.chosen - x.rejected))


def ipo(x: LossInputs) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17) on per-token means of w and l: (w - l - 1 / (2 beta))^2. 1 / (4 beta^2) at the reference."""
    return (x.chosen_means - x.rejected_means - 1 / (2 * x.beta)) ** 2


def cdpo(x: LossInputs) -> Tensor:
    """Conservative DPO (Mitchell 2023, ericmitchell.ai/cdpo.pdf), e = label_smoothing the share of labels that are wrong:
    -(1 - e) log sigmoid(beta (w - l)) - e log sigmoid(-beta (w - l)). log 2 at the reference for every e.
    """
    margins = x.beta * (x.chosen - x.rejected)
    return -(1 - x.label_smoothing) * logsigmoid(margins) - x.label_smoothing * logsigmoid(-margins)


def robust(x: LossInputs) -> Tensor:
    """Robust DPO (arXiv 2403.00409), unbiased where a share e = label_smoothing of the labels is wrong:
    (-(1 - e) log sigmoid(beta (w - l)) + e log sigmoid(-beta (w - l))) / (1 - 2 e). log 2 at the reference for every e.
    """
    margins = x.beta * (x.chosen - x.rejected)
    clean, flipped = -logsigmoid(margins), -logsigmoid(-margins)
    return ((1 - x.label_smoothing) * clean - x.label_smoothing * flipped) / (1 - 2 * x.label_smoothing)


def simpo(x: LossInputs) -> Tensor:
    """SimPO (arXiv 2405.14734, eq. 6), without a reference: -log sigmoid(beta (logp_w / |w| - logp_l / |l|) - gamma), gamma =
    simpo_gamma in units of reward. Its value depends on the policy alone: log(1 + exp(gamma)) where both responses have one mean.
    """
    chosen, rejected = x.chosen_logps / x.chosen_lengths, x.rejected_logps / x.rejected_lengths
    return -logsigmoid(x.beta * (chosen - rejected) - x.simpo_gamma)


def orpo(x: LossInputs) -> Tensor:
    """ORPO's odds-ratio term alone (arXiv 2403.07691, eq. 7), without a reference: -beta log sigmoid(log odds_w - log odds_l), with
    odds = p / (1 - p), log p = logp / length, and beta the paper's lambda. ORPO itself is `("nll", "orpo")`.
    beta log 2 where both responses have one mean log-probability.
    """
    chosen, rejected = x.chosen_logps / x.chosen_lengths, x.rejected_logps / x.rejected_lengths
    return -x.beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def bco_pair(x: LossInputs) -> Tensor:
    """BCO (arXiv 2404.04656) on pairs: -log sigmoid(beta w - s) - log sigmoid(-(beta l - s)), s = bco_shift the reward
    shift, in the paper a running mean of (beta w + beta l) / 2. log(1 + exp(s)) + log(1 + exp(-s)) at the reference; 2 log 2 for s = 0.
    """
    return -logsigmoid(x.beta * x.chosen - x.bco_shift) - logsigmoid(x.bco_shift - x.beta * x.rejected)


def kto_pair(x: LossInputs) -> Tensor:
    """KTO (arXiv 2402.01306, both lambdas 1) on pairs, mean of the two responses' losses:
    (1 - sigmoid(beta (w - z_l)) + 1 - sigmoid(beta (z_w - l))) / 2. 1 / 2 at the reference.

    The paper estimates its point of reference z0, the KL divergence from the reference, on responses of other prompts, which costs
    another forward. Here, as in the form for pairs that its authors' report gives, the other half of the batch stands for them:
    z_l = max(0, mean l) and z_w = max(0, mean w) over the batch given, no gradient through either. The value thus depends on what
    shares a batch.
    """
    of_chosen, of_rejected = (ratios.detach().mean().clamp(min=0) for ratios in (x.chosen, x.rejected))
    chosen = torch.sigmoid(x.beta * (of_rejected - x.chosen))
    rejected = torch.sigmoid(x.beta * (x.rejected - of_chosen))
    return (chosen + rejected) / 2


def copo(x: LossInputs) -> Tensor:
    """mDPO's conditional term (arXiv 2406.11839, eq. 3): -log sigmoid(beta (w - c)). log 2 at the reference."""
    assert x.corrupted is not None
    return -logsigmoid(x.beta * (x.chosen - x.corrupted))


def ancpo(x: LossInputs) -> Tensor:
    """mDPO's anchor (arXiv 2406.11839, eq. 4), d = anchor in units of reward, summed over `anchors`: -log sigmoid(beta w - d) pulls the
    chosen reward above d, -log sigmoid(d - beta l) and -log sigmoid(d - beta c) the others below it. At the reference
    log(1 + exp(d)) for "chosen" and log(1 + exp(-d)) for each other; log 2 an anchor for d = 0.
    """
    ratios = {"chosen": x.chosen, "rejected": x.rejected, "corrupted": x.corrupted}
    total = torch.zeros_like(x.chosen)
    for name in x.anchors:
        ratio = ratios[name]
        assert ratio is not None
        above = x.beta * ratio - x.anchor
        total = total - logsigmoid(above if name == "chosen" else -above)
    return total


def nll(x: LossInputs) -> Tensor:
    """Negative log-likelihood of the chosen responses, mean over the batch's tokens (the gamma term of MIA-DPO), without a reference."""
    return (-x.chosen_logps.sum() / x.chosen_lengths.sum()).expand(x.chosen_logps.shape)


def _log_odds(mean_logps: Tensor) -> Tensor:
    """log p - log(1 - p). A p that rounds to 1 counts as the number before it, which keeps value and gradient finite."""
    mean_logps = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    return mean_logps - torch.log(-torch.expm1(mean_logps))


LOSSES: dict[str, Callable[[LossInputs], Tensor]] = {
    f.__name__: f for f in (sigmoid, hinge, ipo, cdpo, robust, simpo, orpo, bco_pair, kto_pair, nll, copo, ancpo)
}
ANCHORS = ("chosen", "rejected", "corrupted")
"""What "ancpo" can hold above ("chosen") or below (the others) its anchor."""
REFERENCE_FREE = frozenset({"nll", "simpo", "orpo"})
"""Losses that do not look at the reference model."""
NEEDS_CORRUPTED = frozenset({"copo"})
"""Losses that always need the corrupted branch; "ancpo" does where its `anchors` name it."""
NEEDS_LENGTHS = frozenset({"ipo", "simpo", "orpo", "nll"})
"""Losses that need the token counts of both responses; "nll" those of the chosen one only."""
SMOOTHED = frozenset({"cdpo", "robust"})
"""Losses that `label_smoothing` acts on."""


def forward(inputs: LossInputs, loss_type: tuple[str, ...], loss_weights: tuple[float, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """-> weighted sum of the losses' batch means (scalar), and each loss per example (B,)."""
    losses = {name: LOSSES[name](inputs) for name in loss_type}
    total = sum(
        (weight * losses[name].mean() for name, weight in zip(loss_type, loss_weights, strict=True)),
        start=inputs.chosen.new_zeros(()),
    )
    return total, losses
