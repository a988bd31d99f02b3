"""`preference_loss`: any weighted list of preference losses as a pure function of sequence log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.reference.preference_loss import LOSSES, NEEDS_CORRUPTED, LossInputs
from ..backends.registry import resolve
from .checks import check_tensor

OP = "preference_loss"


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
    """(B,) response tokens; needed by "ipo" and "nll"."""
    rejected_lengths: Tensor | None = None
    """(B,) response tokens; needed by "ipo"."""


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """What `preference_loss` returns."""

    loss: Tensor
    """Scalar: weighted sum of the batch means. The only part that carries a gradient."""
    losses: dict[str, Tensor]
    """(B,) per loss, unweighted."""
    rewards: dict[str, Tensor]
    """(B,) `beta (log p - log p_ref)` of "chosen", "rejected" and, if there, "corrupted"."""

    @property
    def accuracies(self) -> Tensor:
        """(B,) 1.0 where the chosen reward is above the rejected one."""
        return (self.rewards["chosen"] > self.rewards["rejected"]).float()

    @property
    def margins(self) -> Tensor:
        """(B,) chosen minus rejected reward."""
        return self.rewards["chosen"] - self.rewards["rejected"]


def preference_loss(
    policy: SequenceLogps,
    reference: SequenceLogps | None = None,
    *,
    loss_type: Sequence[str] = ("sigmoid",),
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    anchor: float = 0.0,
    backend: str = "auto",
) -> PreferenceLoss:
    """Preference loss of a batch of pairs or triples.

    With lw, ll, lc the policy's log-probabilities of chosen, rejected and chosen-under-the-corrupted-picture minus the reference's, the
    default is DPO, `-log sigmoid(beta (lw - ll))`; `("sigmoid", "copo", "ancpo")` is mDPO; `("sigmoid", "nll")` is MIA-DPO.
    Equivalent PyTorch for the default: `-logsigmoid(beta * (lw - ll)).mean()`.

    Args:
        policy: (B,) log-probabilities that carry the gradient.
        reference: the same under the reference model; None = reference-free, all zeros.
        loss_type: names among "sigmoid", "hinge", "ipo", "copo", "ancpo", "nll"; equations and sources are in
            `mmdpo_kernels.backends.reference.preference_loss`.
        loss_weights: one factor a loss, default 1.
        beta: strength of the pull towards the reference, above 0.
        anchor: delta of "ancpo", in units of reward.
        backend: "auto", or a name from `backends()["preference_loss"]`.

    Returns:
        `PreferenceLoss(loss, losses, rewards)`; rewards and losses are detached.

    Raises:
        TypeError, ValueError: unknown loss, weights that do not match, a missing corrupted branch or missing lengths.
    """
    names, weights = _check_losses(loss_type, loss_weights)
    if not beta > 0:
        raise ValueError(f"{OP}: beta must be above 0, got {beta}")
    check_tensor(OP, "policy.chosen", policy.chosen, ("B",), floating=True)
    _check_logps("policy", policy, policy.chosen.shape[0])
    if reference is not None:
        _check_logps("reference", reference, policy.chosen.shape[0])
    missing = [n for n in names if n in NEEDS_CORRUPTED and policy.corrupted is None]
    if missing:
        raise ValueError(
            f"{OP}: loss {missing[0]!r} needs log-probabilities under the corrupted picture, policy.corrupted is None"
        )
    inputs = LossInputs(
        chosen=_ratio("chosen", policy, reference),
        rejected=_ratio("rejected", policy, reference),
        corrupted=None if policy.corrupted is None else _ratio("corrupted", policy, reference),
        chosen_logps=_wide(policy.chosen),
        chosen_lengths=_lengths("chosen_lengths", policy, names, ("ipo", "nll")),
        rejected_lengths=_lengths("rejected_lengths", policy, names, ("ipo",)),
        beta=beta,
        anchor=anchor,
    )
    module = resolve(OP, backend, policy.chosen.device, policy.chosen.dtype)
    loss, losses = module.forward(inputs, names, weights)
    ratios = {"chosen": inputs.chosen, "rejected": inputs.rejected, "corrupted": inputs.corrupted}
    return PreferenceLoss(
        loss=loss,
        losses={name: value.detach() for name, value in losses.items()},
        rewards={name: beta * ratio.detach() for name, ratio in ratios.items() if ratio is not None},
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


def _check_logps(name: str, logps: SequenceLogps, batch: int) -> None:
    for field in ("chosen", "rejected"):
        check_tensor(OP, f"{name}.{field}", getattr(logps, field), (batch,), floating=True)
    if logps.corrupted is not None:
        check_tensor(OP, f"{name}.corrupted", logps.corrupted, (batch,), floating=True)


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


def _lengths(field: str, policy: SequenceLogps, names: tuple[str, ...], needed_by: tuple[str, ...]) -> Tensor:
    lengths = getattr(policy, field)
    if lengths is not None:
        check_tensor(OP, f"policy.{field}", lengths, (policy.chosen.shape[0],))
        return _wide(lengths.to(policy.chosen.device))
    needing = [name for name in names if name in needed_by]
    if needing:
        raise ValueError(f"{OP}: loss {needing[0]!r} needs policy.{field}, got None")
    return torch.ones_like(_wide(policy.chosen))
