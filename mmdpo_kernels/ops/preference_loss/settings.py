"""What a call of `preference_loss` asks for."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from ...backends.loss_options import LossOptions
from ...loss_terms import BATCH_VALUES, LINKS, TOKEN_VALUES, VALUES, Term
from ...losses import ANCHORS, EXTENDED, LOSSES, SMOOTHED, LossParameters

OP = "preference_loss"


class LossRequest(NamedTuple):
    """The options of a call."""

    names: tuple[str, ...]
    """A loss that is named twice counts with both weights."""
    weights: tuple[float, ...] | None
    """One a name; None: all 1."""
    parameters: LossParameters
    length_normalised: bool


class LossSettings(NamedTuple):
    """Options that are in range, and what they need of the log-probabilities."""

    options: LossOptions
    branches: frozenset[str]
    """Those that a loss looks at, and "chosen" and "rejected"."""
    lengths: dict[str, str]
    """Each branch whose responses' token counts are asked for -> what asks for them; of all branches under the name ""."""


def as_names(names: Sequence[str]) -> tuple[str, ...]:
    """A tuple, of one where a string is given."""
    return (names,) if isinstance(names, str) else tuple(names)


def settings(request: LossRequest) -> LossSettings:
    """What follows from the options.

    Raises:
        ValueError: unknown loss, settings out of range, weights that do not match.
    """
    names, weights, parameters, length_normalised = request
    factors = _checked_weights(names, weights)
    anchors = parameters.anchors
    if not anchors or len(set(anchors)) != len(anchors) or not set(anchors).issubset(ANCHORS):
        raise ValueError(f"{OP}: anchors must name one or more of {', '.join(ANCHORS)}, each once, got {list(anchors)}")
    _check_ranges(names, parameters)
    total: dict[str, float] = {}
    for name, weight in zip(names, factors, strict=True):
        total[name] = total.get(name, 0.0) + weight
    terms = {name: _checked_terms(name, tuple(LOSSES[name](parameters))) for name in total}
    options = LossOptions(
        names=tuple(total),
        weights=tuple(total.values()),
        terms=tuple(terms.values()),
        beta=parameters.beta,
        length_normalised=bool(length_normalised),
    )
    branches = {"chosen", "rejected"}
    lengths: dict[str, str] = {}
    for name, each in terms.items():
        for kind, branch, _ in (value for term in each for value in term.values):
            branches.add(branch)
            if kind in TOKEN_VALUES:
                lengths.setdefault(branch, f"loss {name!r}")
    if length_normalised:
        lengths.setdefault("", "length_normalised")
    return LossSettings(options=options, branches=frozenset(branches), lengths=lengths)


kept_settings = functools.lru_cache(maxsize=256)(settings)
"""`settings`, for all calls but those that `torch.compile` traces: it has its own ways to do things once."""


def _checked_terms(name: str, terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """What the table says of a loss, for whoever adds a row to it."""
    for term in terms:
        kinds = [value.kind for value in term.values]
        if term.link not in LINKS or not kinds or not set(VALUES).issuperset(kinds):
            raise ValueError(
                f"{OP}: a term of loss {name!r} must have a link among {', '.join(LINKS)} and one or more values among {', '.join(VALUES)}, "
                f"got {term.link!r} of {kinds}"
            )
        if "batch_logp" in kinds and not BATCH_VALUES.issuperset(kinds):
            raise ValueError(
                f"{OP}: a term of loss {name!r} has 'batch_logp' beside a record's own values ({kinds}); its gradient would need the whole "
                "batch twice. Make it a term of its own"
            )
        numbers = term.scale, term.offset, term.weight, *(value.coefficient for value in term.values)
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"{OP}: the numbers of a term of loss {name!r} must be finite, got {term}")
    if not terms:
        raise ValueError(f"{OP}: loss {name!r} must have one term or more, got none")
    return terms


def _checked_weights(names: tuple[str, ...], weights: tuple[float, ...] | None) -> tuple[float, ...]:
    unknown = [name for name in names if name not in LOSSES]
    if unknown or not names:
        got = ", ".join(map(repr, unknown)) if unknown else "an empty list"
        raise ValueError(f"{OP}: loss_type must name losses among {', '.join(LOSSES)}, got {got}")
    factors = (1.0,) * len(names) if weights is None else tuple(float(weight) for weight in weights)
    if len(factors) != len(names):
        raise ValueError(f"{OP}: loss_weights must have one entry a loss ({len(names)}), got {len(factors)}")
    return factors


def _check_ranges(names: tuple[str, ...], parameters: LossParameters) -> None:
    beta, label_smoothing, simpo_gamma = parameters.beta, parameters.label_smoothing, parameters.simpo_gamma
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
    for name in ("anchor", "bco_shift"):
        value = getattr(parameters, name)
        if not -math.inf < value < math.inf:
            raise ValueError(f"{OP}: {name} must be a finite number, got {value}")
    _check_branch_names(names, parameters)


def _check_branch_names(names: tuple[str, ...], parameters: LossParameters) -> None:
    extra, share, corrupted = parameters.extra_negative, parameters.extra_negative_weight, parameters.corrupted
    if extra is not None and EXTENDED.isdisjoint(names):
        raise ValueError(
            f"{OP}: extra_negative={extra!r} acts on {', '.join(sorted(EXTENDED))} only, got loss_type {list(names)}; leave it out"
        )
    if extra in ("chosen", "rejected"):
        raise ValueError(f"{OP}: extra_negative must name a branch other than chosen and rejected, got {extra!r}")
    if not 0 <= share <= 1:
        raise ValueError(f"{OP}: extra_negative_weight must be in [0, 1], got {share}")
    if not corrupted or len(set(corrupted)) != len(corrupted):
        raise ValueError(f"{OP}: corrupted must name one or more branches, each once, got {list(corrupted)}")
    if parameters.similar_beta is not None and not 0 < parameters.similar_beta < math.inf:
        raise ValueError(f"{OP}: similar_beta must be above 0, or None for beta, got {parameters.similar_beta}")
