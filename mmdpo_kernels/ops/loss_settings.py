"""What a call of `preference_loss` asks for."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from ..backends.loss_options import LossOptions
from ..backends.reference.preference_loss import ANCHORS, LOSSES, NEEDS_CORRUPTED, NEEDS_LENGTHS, SMOOTHED

OP = "preference_loss"


class LossSettings(NamedTuple):
    """Options that are in range, and what they need of the log-probabilities."""

    options: LossOptions
    needs_corrupted: str | None
    """A loss that looks at the corrupted branch."""
    needs_chosen_lengths: str | None
    """What asks for the token counts of chosen responses."""
    needs_rejected_lengths: str | None


def as_names(names: Sequence[str]) -> tuple[str, ...]:
    """A tuple, of one where a string is given."""
    return (names,) if isinstance(names, str) else tuple(names)


def settings(
    names: tuple[str, ...],
    weights: tuple[float, ...] | None,
    beta: float,
    label_smoothing: float,
    anchor: float,
    anchors: tuple[str, ...],
    simpo_gamma: float,
    bco_shift: float,
    length_normalised: bool,
) -> LossSettings:
    """A loss that is named twice counts with both weights.

    Raises:
        ValueError: unknown loss, settings out of range, weights that do not match.
    """
    factors = _checked_weights(names, weights)
    if not anchors or len(set(anchors)) != len(anchors) or not set(anchors).issubset(ANCHORS):
        raise ValueError(f"{OP}: anchors must name one or more of {', '.join(ANCHORS)}, each once, got {list(anchors)}")
    _check_ranges(names, beta, label_smoothing, anchor, simpo_gamma, bco_shift)
    total: dict[str, float] = {}
    for name, weight in zip(names, factors, strict=True):
        total[name] = total.get(name, 0.0) + weight
    options = LossOptions(
        names=tuple(total),
        weights=tuple(total.values()),
        beta=float(beta),
        label_smoothing=float(label_smoothing),
        anchor=float(anchor),
        anchors=anchors,
        simpo_gamma=float(simpo_gamma),
        bco_shift=float(bco_shift),
        length_normalised=bool(length_normalised),
    )
    corrupted = [name for name in total if name in NEEDS_CORRUPTED or (name == "ancpo" and "corrupted" in anchors)]
    lengths = [name for name in total if name in NEEDS_LENGTHS]
    both = [name for name in lengths if name != "nll"]
    return LossSettings(
        options=options,
        needs_corrupted=corrupted[0] if corrupted else None,
        needs_chosen_lengths=_asking(lengths, length_normalised),
        needs_rejected_lengths=_asking(both, length_normalised),
    )


kept_settings = functools.lru_cache(maxsize=256)(settings)
"""`settings`, for all calls but those that `torch.compile` traces: it has its own ways to do things once."""


def _asking(names: list[str], length_normalised: bool) -> str | None:
    if names:
        return f"loss {names[0]!r}"
    return "length_normalised" if length_normalised else None


def _checked_weights(names: tuple[str, ...], weights: tuple[float, ...] | None) -> tuple[float, ...]:
    unknown = [name for name in names if name not in LOSSES]
    if unknown or not names:
        got = ", ".join(map(repr, unknown)) if unknown else "an empty list"
        raise ValueError(f"{OP}: loss_type must name losses among {', '.join(LOSSES)}, got {got}")
    factors = (1.0,) * len(names) if weights is None else tuple(float(weight) for weight in weights)
    if len(factors) != len(names):
        raise ValueError(f"{OP}: loss_weights must have one entry a loss ({len(names)}), got {len(factors)}")
    return factors


def _check_ranges(
    names: tuple[str, ...], beta: float, label_smoothing: float, anchor: float, simpo_gamma: float, bco_shift: float
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
        if not -math.inf < value < math.inf:
            raise ValueError(f"{OP}: {name} must be a finite number, got {value}")
