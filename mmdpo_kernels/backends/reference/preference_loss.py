"""`preference_loss` in plain PyTorch: each loss a function of sequence log-probabilities, differentiated by autograd.

In the equations w, l and c are `log p - log p_ref` of the chosen response, of the rejected one, and of the chosen one under the
corrupted picture, summed over tokens (`length_normalised`: their means over tokens); logp are the policy's own log-probabilities.
"At the reference" is where policy and reference are the same model, so that w = l = c = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..loss_options import BRANCHES, LossArrays, LossOptions


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
ANCHORS = BRANCHES
"""What "ancpo" can hold above ("chosen") or below (the others) its anchor."""
REFERENCE_FREE = frozenset({"nll", "simpo", "orpo"})
"""Losses that do not look at the reference model."""
NEEDS_CORRUPTED = frozenset({"copo"})
"""Losses that always need the corrupted branch; "ancpo" does where its `anchors` name it."""
NEEDS_LENGTHS = frozenset({"ipo", "simpo", "orpo", "nll"})
"""Losses that need the token counts of both responses; "nll" those of the chosen one only."""
SMOOTHED = frozenset({"cdpo", "robust"})
"""Losses that `label_smoothing` acts on."""


def forward(arrays: LossArrays, options: LossOptions) -> tuple[Tensor, Tensor]:
    """-> weighted sum of the losses' batch means (), which autograd can differentiate again and again, and the table (see `TableRows`).

    A ratio that is not finite makes the sum NaN, also where a loss levels out or does not look at it.
    """
    policy, reference = _values(arrays, arrays.policy, arrays.lengths is None), None
    if arrays.reference is not None:
        reference = _values(arrays, arrays.reference.detach(), arrays.lengths is None or arrays.reference_is_sums)
    ratios = policy if reference is None else policy - reference
    counts = _counts(arrays)
    seen = ratios / counts if options.length_normalised else ratios
    losses = _losses(_named(arrays, policy), _named(arrays, ratios), _named(arrays, seen), _named(arrays, counts), options)
    total = sum(
        (weight * losses[name].mean() for name, weight in zip(options.names, options.weights, strict=True)),
        start=0 * ratios.sum(),
    )
    with torch.no_grad():
        rewards = options.beta * seen
        chosen, rejected = (rewards[arrays.branches.index(name)] for name in ("chosen", "rejected"))
        metrics = torch.stack(((chosen > rejected).to(rewards.dtype), chosen - rejected))
        table = torch.cat((torch.stack(list(losses.values())), rewards, policy, metrics))
    return total, table


def response_values(token_logps: Tensor, counts: list[int], weights: Tensor | None) -> Tensor:
    """(n,) sums over the tokens of responses that lie one after another, or weighted means; 0 for a response without tokens."""
    if not counts:
        return token_logps.new_zeros(0)
    if weights is None:
        return torch.stack([piece.sum() for piece in token_logps.split(counts)])
    tops = torch.stack([piece.sum() for piece in (weights * token_logps).split(counts)])
    totals = torch.stack([piece.sum() for piece in weights.split(counts)])
    return tops / torch.where(totals == 0, torch.ones_like(totals), totals)


def check_tokens(op: str, elements: int, counts: list[int], weights: Tensor | None) -> None:
    """Counts that sum to the elements; weights, on the CPU where nobody waits for them, at least 0 and not all 0 in a response.

    Raises:
        ValueError: others.
    """
    if min(counts, default=0) < 0 or sum(counts) != elements:
        raise ValueError(f"{op}: lengths must be counts that sum to the {elements} token_logps, got {counts}")
    if weights is None or weights.device.type != "cpu":
        return
    for index, (piece, count) in enumerate(zip(weights.split(counts), counts, strict=True)):
        if count and not (piece.min() >= 0 and 0 < piece.sum() < math.inf):
            raise ValueError(f"{op}: weights must be 0 or more and not all 0, got {piece.tolist()} for response {index}")


def _values(arrays: LossArrays, logps: Tensor, are_sums: bool) -> Tensor:
    """(K, B) sums or weighted means of responses."""
    branches = len(arrays.branches)
    if are_sums:
        return logps.view(branches, arrays.batch)
    assert arrays.lengths is not None
    counts = arrays.lengths.flatten().tolist()
    check_tokens("preference_loss", logps.shape[0], counts, arrays.weights)
    return response_values(logps, counts, arrays.weights).view(arrays.batch, branches).T


def _counts(arrays: LossArrays) -> Tensor:
    """(K, B) tokens; ones where nothing asks for them."""
    if arrays.lengths is not None:
        return arrays.lengths.T.to(arrays.policy.dtype)
    shape = len(arrays.branches), arrays.batch
    return arrays.policy.new_ones(shape) if arrays.counts is None else arrays.counts.view(shape)


def _named(arrays: LossArrays, rows: Tensor) -> dict[str, Tensor]:
    return dict(zip(arrays.branches, rows.unbind(0), strict=True))


def _losses(
    logps: dict[str, Tensor], ratios: dict[str, Tensor], seen: dict[str, Tensor], counts: dict[str, Tensor], options: LossOptions
) -> dict[str, Tensor]:
    inputs = LossInputs(
        chosen=seen["chosen"],
        rejected=seen["rejected"],
        corrupted=seen.get("corrupted"),
        chosen_means=ratios["chosen"] / counts["chosen"],
        rejected_means=ratios["rejected"] / counts["rejected"],
        chosen_logps=logps["chosen"],
        rejected_logps=logps["rejected"],
        chosen_lengths=counts["chosen"],
        rejected_lengths=counts["rejected"],
        beta=options.beta,
        label_smoothing=options.label_smoothing,
        anchor=options.anchor,
        anchors=options.anchors,
        simpo_gamma=options.simpo_gamma,
        bco_shift=options.bco_shift,
    )
    return {name: LOSSES[name](inputs) for name in options.names}
