"""`preference_loss` in Triton: one launch from log-probabilities to losses, metrics and gradient."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..loss_options import BRANCHES, LossArrays, LossOptions, table_rows, table_size
from ..reference.preference_loss import LOSSES
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
    factors = dict(zip(options.names, options.weights, strict=True))
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
            "label_smoothing": options.label_smoothing,
            "anchor": options.anchor,
            "simpo_gamma": options.simpo_gamma,
            "bco_shift": options.bco_shift,
            **{f"{name}_weight": factors.get(name, 0.0) for name in LOSSES},
        },
        constants=_constants(options.names, options.anchors, options.length_normalised, branches)
        | {"REFERENCE_IS_SUMS": reference_is_sums, "BLOCK_B": BLOCK_B, "BLOCK_T": BLOCK_T},
        num_warps=8,
        num_stages=1,
        maxnreg=255,  # all there are, for the one program
    )


@functools.lru_cache(maxsize=64)
def _constants(
    names: tuple[str, ...], anchors: tuple[str, ...], length_normalised: bool, branches: tuple[str, ...]
) -> dict[str, Any]:
    rows = table_rows(len(names), len(branches))
    return {
        **{name.upper(): names.index(name) if name in names else None for name in LOSSES},
        **{f"ANCHOR_{name.upper()}": name in anchors for name in BRANCHES},
        "BRANCHES": len(branches),
        **{name.upper(): branches.index(name) if name in branches else None for name in BRANCHES},
        "LENGTH_NORMALISED": length_normalised,
        "REWARDS": rows.rewards,
        "LOGPS": rows.logps,
        "ACCURACY": rows.accuracy,
        "MARGIN": rows.margin,
    }


REPRESENTATIVE = ("tokens mdpo",)


def specializations(target: int) -> list[Specialization]:
    """mDPO, MIA-DPO, and every loss at once; from tokens and from sums."""
    mdpo, mia = ("sigmoid", "copo", "ancpo"), ("sigmoid", "nll")
    cases = {
        "tokens mdpo": (mdpo, True, {}),
        "tokens mia weights": (mia, True, {"weights": True}),
        "tokens all": (tuple(LOSSES), True, {"weights": True, "length_normalised": True}),
        "sums mdpo": (mdpo, False, {}),
        "sums all": (tuple(LOSSES), False, {"length_normalised": True}),
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
    options = LossOptions(
        names=names,
        weights=(1.0,) * len(names),
        beta=0.1,
        label_smoothing=0.1 if normalised else 0.0,
        anchor=0.0,
        anchors=BRANCHES if normalised else BRANCHES[:1],
        simpo_gamma=0.5,
        bco_shift=0.0,
        length_normalised=normalised,
    )
    return _launch(arrays, options, numbers(1), numbers(count), numbers(table_size(len(names), len(BRANCHES)), batch))
