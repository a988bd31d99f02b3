"""`preference_loss` in Triton: one launch from log-probabilities to losses, metrics and gradient."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...loss_terms import BATCH_VALUES, BRANCHES, LINKS, VALUES, Term
from ...losses import LOSSES, LossParameters, values_of  # for examples alone: the kernel is given terms
from ..loss_options import LossArrays, LossOptions, table_size
from . import runtime
from .launch import Launch
from .preference_loss_kernels import loss_kernel
from .runtime import Specialization

BLOCK_B, BLOCK_T = 16, 32
"""Records and tokens in a tile: the largest for which the values of all losses stay in registers."""


def unavailable_reason(device_type: str, dtype: torch.dtype, **features: object) -> str | None:
    """Why this backend cannot serve the call, or None."""
    return runtime.unavailable_reason(device_type, dtype)


def write(arrays: LossArrays, options: LossOptions, loss: Tensor, gradient: Tensor | None, table: Tensor) -> None:
    """Write the loss (), its gradient in `arrays.policy`, where wanted, and the table (see `TableRows`).

    Lengths that do not sum to R make the loss NaN: to raise an error, one would have to wait for the device.
    """
    _launch(arrays, options, loss, gradient, table).run()


def _launch(arrays: LossArrays, options: LossOptions, loss: Tensor, gradient: Tensor | None, table: Tensor) -> Launch:
    policy, reference, reference_is_sums, lengths, weights, counts, branches, batch = arrays
    return Launch(
        kernel=loss_kernel,
        programs=1,
        arguments={
            "policy": policy,
            "reference": reference,
            "lengths": lengths,
            "weights": weights,
            "counts": counts,
            "loss": loss,
            "gradient": gradient,
            "table": table,
            "batch": batch,
            "elements": policy.shape[0],
            "beta": options.beta,
            **_numbers(options),
        },
        constants=_constants(options.terms, branches)
        | {
            "LENGTH_NORMALISED": options.length_normalised,
            "REFERENCE_IS_SUMS": reference_is_sums,
            "BLOCK_B": BLOCK_B,
            "BLOCK_T": BLOCK_T,
        },
        num_warps=8,
        num_stages=1,
        maxnreg=255,  # all there are, for the one program
    )


@functools.lru_cache(maxsize=64)
def _numbers(options: LossOptions) -> dict[str, tuple[float, ...]]:
    """What the compiled kernel is given anew at each call."""
    terms = [term for of_loss in options.terms for term in of_loss]
    weights = [weight for of_loss, weight in zip(options.terms, options.weights, strict=True) for _ in of_loss]
    return {
        "loss_weights": options.weights,
        "term_weights": tuple(term.weight for term in terms),
        "scales": tuple(term.scale for term in terms),
        "offsets": tuple(term.offset for term in terms),
        "shares": tuple(weight * term.weight * term.scale for weight, term in zip(weights, terms, strict=True)),
        "coefficients": tuple(value.coefficient for term in terms for value in term.values),
    }


@functools.lru_cache(maxsize=64)
def _constants(losses: tuple[tuple[Term, ...], ...], branches: tuple[str, ...]) -> dict[str, Any]:
    """What the kernel is compiled for."""
    terms = [term for of_loss in losses for term in of_loss]
    values = [value for term in terms for value in term.values]
    batched = {value.branch for value in values if value.kind in BATCH_VALUES}
    return {
        "LOSS_OF": tuple(row for row, of_loss in enumerate(losses) for _ in of_loss),
        "LINKS": tuple(LINKS.index(term.link) for term in terms),
        "TERM_OF": tuple(at for at, term in enumerate(terms) for _ in term.values),
        "KINDS": tuple(VALUES.index(value.kind) for value in values),
        "COLUMNS": tuple(branches.index(value.branch) for value in values),
        "BATCHED": tuple(int(name in batched) for name in branches),
        "BRANCHES": len(branches),
        "CHOSEN": branches.index("chosen"),
        "REJECTED": branches.index("rejected"),
    }


REPRESENTATIVE = ("tokens mdpo",)


def specializations(target: int) -> list[Specialization]:
    """mDPO, MIA-DPO, and every loss of the table that looks at the usual branches at once; from tokens and from sums."""
    every = tuple(name for name in LOSSES if {value.branch for value in values_of(name)}.issubset(BRANCHES))
    mdpo, mia = ("sigmoid", "copo", "ancpo"), ("sigmoid", "nll")
    cases = {
        "tokens mdpo": (mdpo, True, {}),
        "tokens mia weights": (mia, True, {"weights": True}),
        "tokens all": (every, True, {"weights": True, "length_normalised": True}),
        "sums mdpo": (mdpo, False, {}),
        "sums all": (every, False, {"length_normalised": True}),
    }
    return [_example(*case).describe(f"preference_loss {label}") for label, case in cases.items()]


def _example(names: tuple[str, ...], tokens: bool, features: dict[str, bool]) -> Launch:
    """A call without data."""

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    batch, length = 64, 100
    count = batch * len(BRANCHES) * (length if tokens else 1)
    normalised = features.get("length_normalised", False)
    arrays = LossArrays(
        policy=numbers(count),
        reference=numbers(count),
        reference_is_sums=not tokens,
        lengths=torch.empty(batch, len(BRANCHES), dtype=torch.int64, device="meta") if tokens else None,
        weights=numbers(count) if features.get("weights") else None,
        counts=numbers(count) if normalised and not tokens else None,
        branches=BRANCHES,
        batch=batch,
    )
    parameters = LossParameters(anchors=BRANCHES if normalised else BRANCHES[:1])
    options = LossOptions(
        names=names,
        weights=(1.0,) * len(names),
        terms=tuple(tuple(LOSSES[name](parameters)) for name in names),
        beta=parameters.beta,
        length_normalised=normalised,
    )
    return _launch(arrays, options, numbers(1), numbers(count), numbers(table_size(len(names), len(BRANCHES)), batch))
