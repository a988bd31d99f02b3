"""`preference_loss` in plain PyTorch: the terms of each loss on log-probabilities of responses, differentiated by autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...loss_terms import Term
from ..loss_options import LossArrays, LossOptions


def unavailable_reason(device_type: str, dtype: torch.dtype, **features: object) -> str | None:
    """None: the reference runs everywhere."""
    return None


@dataclass(frozen=True, kw_only=True)
class Responses:
    """Those of one branch; every tensor is (B,)."""

    ratio: Tensor
    """log p - log p_ref, as losses see it: with `length_normalised` per token."""
    mean_ratio: Tensor
    """The same per token, whether or not `ratio` is."""
    logp: Tensor
    """log p, summed over tokens."""
    count: Tensor
    """Tokens."""


LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "minus_log_sigmoid": lambda x: -logsigmoid(x),
    "hinge": lambda x: torch.relu(1 - x),
    "square": lambda x: x**2,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}

VALUES: dict[str, Callable[[Responses], Tensor]] = {
    "ratio": lambda of: of.ratio,
    "mean_ratio": lambda of: of.mean_ratio,
    "logp": lambda of: of.logp,
    "mean_logp": lambda of: of.logp / of.count,
    "log_odds": lambda of: _log_odds(of.logp / of.count),
    "batch_ratio": lambda of: of.ratio.detach().mean().clamp(min=0),
    "batch_logp": lambda of: of.logp.sum() / of.count.sum(),
}


def _log_odds(mean_logps: Tensor) -> Tensor:
    """log p - log(1 - p). A p that rounds to 1 counts as the number before it, which keeps value and gradient finite."""
    mean_logps = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    return mean_logps - torch.log(-torch.expm1(mean_logps))


def _loss(terms: tuple[Term, ...], branches: dict[str, Responses], batch: int) -> Tensor:
    """(B,)"""
    total: Tensor | None = None
    for term in terms:
        values = [coefficient * VALUES[kind](branches[branch]) for kind, branch, coefficient in term.values]
        found = term.weight * LINKS[term.link](term.scale * sum(values[1:], start=values[0]) + term.offset)
        total = found if total is None else total + found
    assert total is not None
    return total.expand(batch)  # a term of batch values alone is one number


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
    rows = zip(seen, ratios / counts, policy, counts, strict=True)
    responses = (Responses(ratio=ratio, mean_ratio=mean, logp=logp, count=count) for ratio, mean, logp, count in rows)
    branches = dict(zip(arrays.branches, responses, strict=True))
    losses = [_loss(terms, branches, arrays.batch) for terms in options.terms]
    total = sum((weight * loss.mean() for loss, weight in zip(losses, options.weights, strict=True)), start=0 * ratios.sum())
    with torch.no_grad():
        rewards = options.beta * seen
        chosen, rejected = (rewards[arrays.branches.index(name)] for name in ("chosen", "rejected"))
        metrics = torch.stack(((chosen > rejected).to(rewards.dtype), chosen - rejected))
        table = torch.cat((torch.stack(losses), rewards, policy, metrics))
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
