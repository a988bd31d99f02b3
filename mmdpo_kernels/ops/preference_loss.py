"""`preference_loss`: any weighted list of preference losses as a pure function of sequence log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.reference.preference_loss import (
    ANCHORS,
    LOSSES,
    NEEDS_CORRUPTED,
    NEEDS_LENGTHS,
    REFERENCE_FREE,
    SMOOTHED,
    LossInputs,
)
from ..backends.registry import resolve
from .checks import check_tensor

OP = "preference_loss"

__all__ = [
    "ANCHORS",
    "LOSSES",
    "NEEDS_CORRUPTED",
    "NEEDS_LENGTHS",
    "REFERENCE_FREE",
    "SMOOTHED",
    "PreferenceLoss",
    "SequenceLogps",
    "preference_loss",
    "sequence_logps",
]


@dataclass(frozen=True, kw_only=True)
class SequenceLogps:
    """Log-probabilities of whole responses, summed over their tokens, under one model."""

    chosen: Tensor
    """(B,) floating."""
    rejected: Tensor
    """(B,) floating."""
    corrupted: Tensor | None = None
    """(B,) floating: the chosen response under the corrupted picture."""
    chosen_lengths: Tensor | None = None
    """(B,) response tokens; needed by `length_normalised` and by the losses in `NEEDS_LENGTHS`. Only the policy's are looked at."""
    rejected_lengths: Tensor | None = None
    """(B,) response tokens; as `chosen_lengths`."""
    corrupted_lengths: Tensor | None = None
    """(B,) response tokens, used by `length_normalised`; None: those of the chosen response, which it is."""


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """What `preference_loss` returns."""

    loss: Tensor
    """Scalar: weighted sum of the batch means. The only part that carries a gradient."""
    losses: dict[str, Tensor]
    """(B,) per loss, unweighted."""
    rewards: dict[str, Tensor]
    """(B,) `beta (log p - log p_ref)` of "chosen", "rejected" and, if there, "corrupted"; per token with `length_normalised`."""

    @property
    def accuracies(self) -> Tensor:
        """(B,) 1.0 where the chosen reward is above the rejected one."""
        return (self.rewards["chosen"] > self.rewards["rejected"]).float()

    @property
    def margins(self) -> Tensor:
        """(B,) chosen minus rejected reward."""
        return self.rewards["chosen"] - self.rewards["rejected"]


def sequence_logps(token_logps: Tensor, lengths: Sequence[int] | Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Log-probabilities of responses from those of their tokens, which lie one response after another.

    Without weights the sums. With weights the weighted means of DDPO (RLHF-V, arXiv 2312.00849),
    `sum(weights * token_logps) / sum(weights)`: with weight 1 for a token that a correction left as it was and gamma for one that it
    changed, the divisor is the paper's N = |unchanged| + gamma |changed|. Being means, these ask for no `length_normalised`, for a
    larger beta, and for losses outside `NEEDS_LENGTHS`. Equivalent PyTorch without weights:
    `torch.stack([piece.sum() for piece in token_logps.split(lengths)])`.

    Args:
        token_logps: (R,) floating; a gradient flows through it.
        lengths: n token counts that sum to R; a tensor on a GPU is waited for.
        weights: (R,), at least 0, not all 0 in a response.

    Returns:
        (n,) in float32 at least; 0 for a response without tokens.

    Raises:
        TypeError, ValueError: shapes that do not fit.
    """
    op = "sequence_logps"
    check_tensor(op, "token_logps", token_logps, ("R",), floating=True)
    counts = [int(length) for length in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]
    if min(counts, default=0) < 0 or sum(counts) != token_logps.shape[0]:
        raise ValueError(f"{op}: lengths must be counts that sum to the {token_logps.shape[0]} token_logps, got {counts}")
    values = _wide(token_logps)
    if not counts:
        return values.new_zeros(0)
    if weights is None:
        return torch.stack([piece.sum() for piece in values.split(counts)])
    check_tensor(op, "weights", weights, (token_logps.shape[0],))
    scales = weights.to(values)
    if scales.device.type == "cpu":
        _check_weights(op, scales, counts)
    tops = torch.stack([piece.sum() for piece in (scales * values).split(counts)])
    totals = torch.stack([piece.sum() for piece in scales.split(counts)])
    return tops / torch.where(totals == 0, torch.ones_like(totals), totals)


def preference_loss(
    policy: SequenceLogps,
    reference: SequenceLogps | None = None,
    *,
    loss_type: Sequence[str] = ("sigmoid",),
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    anchor: float = 0.0,
    anchors: Sequence[str] = ("chosen",),
    simpo_gamma: float = 0.5,
    bco_shift: float = 0.0,
    length_normalised: bool = False,
    backend: str = "auto",
) -> PreferenceLoss:
    """Preference loss of a batch of pairs or triples.

    With w, l, c the policy's log-probabilities of chosen, rejected and chosen-under-the-corrupted-picture minus the reference's, the
    default is DPO, `-log sigmoid(beta (w - l))`; `("sigmoid", "copo", "ancpo")` is mDPO; `("sigmoid", "nll")` is MIA-DPO;
    `("nll", "orpo")` is ORPO. Equivalent PyTorch for the default: `-logsigmoid(beta * (w - l)).mean()`.

    Args:
        policy: (B,) log-probabilities that carry the gradient.
        reference: the same under the reference model; None = reference-free, all zeros. Losses in `REFERENCE_FREE` never look at it.
        loss_type: names in `LOSSES`: "sigmoid", "hinge", "ipo", "cdpo", "robust", "simpo", "orpo", "bco_pair", "kto_pair", "nll",
            "copo", "ancpo"; equations, sources and values at the reference are in
            `mmdpo_kernels.backends.reference.preference_loss`.
        loss_weights: one factor a loss, default 1.
        beta: strength of the pull towards the reference, above 0; of "orpo" the factor of its only term.
        label_smoothing: share of the labels taken to be wrong, in [0, 0.5); acts on "cdpo" and "robust" and is an error without them.
        anchor: delta of "ancpo", in units of reward.
        anchors: rewards that "ancpo" holds: "chosen" above `anchor`, "rejected" and "corrupted" below it.
        simpo_gamma: margin of "simpo", in units of reward, at least 0.
        bco_shift: reward shift of "bco_pair"; 0 leaves it out, as TRL does.
        length_normalised: divide w, l and c by their token counts, in rewards and in every loss that is not per token already
            ("ipo", "simpo", "orpo", "nll").
        backend: "auto", or a name from `backends()["preference_loss"]`.

    Returns:
        `PreferenceLoss(loss, losses, rewards)`; rewards and losses are detached.

    Raises:
        TypeError, ValueError: unknown loss, settings out of range, weights that do not match, a missing corrupted branch or missing
            lengths.
    """
    names, weights = _check_losses(loss_type, loss_weights)
    held = _check_anchors(anchors)
    _check_settings(
        names, beta=beta, label_smoothing=label_smoothing, anchor=anchor, simpo_gamma=simpo_gamma, bco_shift=bco_shift
    )
    check_tensor(OP, "policy.chosen", policy.chosen, ("B",), floating=True)
    _check_logps("policy", policy, policy.chosen.shape[0])
    if reference is not None:
        _check_logps("reference", reference, policy.chosen.shape[0])
    needing = [n for n in names if n in NEEDS_CORRUPTED or (n == "ancpo" and "corrupted" in held)]
    if needing and policy.corrupted is None:
        raise ValueError(
            f"{OP}: loss {needing[0]!r} needs log-probabilities under the corrupted picture, policy.corrupted is None"
        )
    counts = _lengths(policy, names, length_normalised)
    ratios = {name: _ratio(name, policy, reference) for name in ANCHORS if getattr(policy, name) is not None}
    means = {name: ratio / counts[name] for name, ratio in ratios.items()}
    seen = means if length_normalised else ratios
    inputs = LossInputs(
        chosen=seen["chosen"],
        rejected=seen["rejected"],
        corrupted=seen.get("corrupted"),
        chosen_means=means["chosen"],
        rejected_means=means["rejected"],
        chosen_logps=_wide(policy.chosen),
        rejected_logps=_wide(policy.rejected),
        chosen_lengths=counts["chosen"],
        rejected_lengths=counts["rejected"],
        beta=beta,
        label_smoothing=label_smoothing,
        anchor=anchor,
        anchors=held,
        simpo_gamma=simpo_gamma,
        bco_shift=bco_shift,
    )
    module = resolve(OP, backend, policy.chosen.device, policy.chosen.dtype)
    loss, losses = module.forward(inputs, names, weights)
    return PreferenceLoss(
        loss=loss,
        losses={name: value.detach() for name, value in losses.items()},
        rewards={name: beta * ratio.detach() for name, ratio in seen.items()},
    )


def _check_losses(loss_type: Sequence[str], loss_weights: Sequence[float] | None) -> tuple[tuple[str, ...], tuple[float, ...]]:
    names = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
    unknown = [name for name in names if name not in LOSSES]
    if unknown or not names:
        got = ", ".join(map(repr, unknown)) if unknown else "an empty list"
        raise ValueError(f"{OP}: loss_type must name losses among {', '.join(LOSSES)}, got {got}")
    weights = (1.0,) * len(names) if loss_weights is None else tuple(float(weight) for weight in loss_weights)
    if len(weights) != len(names):
        raise ValueError(f"{OP}: loss_weights must have one entry a loss ({len(names)}), got {len(weights)}")
    return names, weights


def _check_anchors(anchors: Sequence[str]) -> tuple[str, ...]:
    held = (anchors,) if isinstance(anchors, str) else tuple(anchors)
    if not held or len(set(held)) != len(held) or not set(held).issubset(ANCHORS):
        raise ValueError(f"{OP}: anchors must name one or more of {', '.join(ANCHORS)}, each once, got {list(held)}")
    return held


def _check_settings(
    names: tuple[str, ...], *, beta: float, label_smoothing: float, anchor: float, simpo_gamma: float, bco_shift: float
) -> None:
    if not 0 < beta < math.inf:
        raise ValueError(f"{OP}: beta must be above 0, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"{OP}: label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if label_smoothing and SMOOTHED.isdisjoint(names):
        raise ValueError(
            f"{OP}: label_smoothing={label_smoothing} acts on {', '.join(sorted(SMOOTHED))} only, got loss_type {list(names)}; "
            "use 'cdpo' for a sigmoid with label smoothing"
        )
    if not 0 <= simpo_gamma < math.inf:
        raise ValueError(f"{OP}: simpo_gamma must be 0 or more, got {simpo_gamma}")
    for name, value in (("anchor", anchor), ("bco_shift", bco_shift)):
        if not math.isfinite(value):
            raise ValueError(f"{OP}: {name} must be a finite number, got {value}")


def _check_logps(name: str, logps: SequenceLogps, batch: int) -> None:
    for field in ("chosen", "rejected"):
        check_tensor(OP, f"{name}.{field}", getattr(logps, field), (batch,), floating=True)
    if logps.corrupted is not None:
        check_tensor(OP, f"{name}.corrupted", logps.corrupted, (batch,), floating=True)


def _check_weights(op: str, scales: Tensor, counts: list[int]) -> None:
    pieces = zip(scales.split(counts), counts, strict=True)
    for index, (piece, count) in enumerate(pieces):
        if count and not (piece.min() >= 0 and 0 < piece.sum() < math.inf):
            raise ValueError(f"{op}: weights must be 0 or more and not all 0, got {piece.tolist()} for response {index}")


def _ratio(field: str, policy: SequenceLogps, reference: SequenceLogps | None) -> Tensor:
    logps = _wide(getattr(policy, field))
    if reference is None:
        return logps
    base = getattr(reference, field)
    if base is None:
        raise ValueError(f"{OP}: policy has '{field}' log-probabilities but reference.{field} is None")
    return logps - _wide(base.detach())


def _wide(values: Tensor) -> Tensor:
    """float32 at least: half precision would round sums over long responses."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _lengths(policy: SequenceLogps, names: tuple[str, ...], length_normalised: bool) -> dict[str, Tensor]:
    """(B,) token counts of each kind of response; ones where nothing asks for them."""
    found = {}
    for response in ANCHORS:
        field = f"{response}_lengths"
        lengths = getattr(policy, field)
        if lengths is not None:
            check_tensor(OP, f"policy.{field}", lengths, (policy.chosen.shape[0],))
            found[response] = _wide(lengths.to(policy.chosen.device))
        elif response == "corrupted":
            found[response] = found["chosen"]
        else:
            needing = [f"loss {name!r}" for name in names if name in NEEDS_LENGTHS and (name, response) != ("nll", "rejected")]
            needing += ["length_normalised"] * length_normalised
            if needing:
                raise ValueError(f"{OP}: {needing[0]} needs policy.{field}, got None")
            found[response] = torch.ones_like(_wide(policy.chosen))
    return found
