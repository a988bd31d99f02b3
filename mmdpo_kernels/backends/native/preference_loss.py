"""`preference_loss` in C++ on the CPU: one call from log-probabilities to losses, metrics and gradient, in float64 arithmetic."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..loss_options import LossArrays, LossOptions
from .extension import address, load, module

OP = "preference_loss"

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def unavailable_reason(device_type: str, dtype: torch.dtype, **features: object) -> str | None:
    """Why this backend cannot serve the call, or None."""
    native = load()
    if isinstance(native, str):
        return native
    if not hasattr(native, "loss_links"):
        return "mmdpo_kernels._native was built from older sources; build it again: `pip install .` in the checkout"
    if device_type != "cpu":
        return f"it runs on cpu tensors, got {device_type}"
    if dtype not in DTYPES:
        return f"it takes float32, float16, bfloat16 and float64, got {dtype}"
    return None


def write(arrays: LossArrays, options: LossOptions, loss: Tensor, gradient: Tensor | None, table: Tensor) -> None:
    """Write the loss (), its gradient in `arrays.policy`, where wanted, and the table (see `TableRows`).

    Raises:
        ValueError: lengths that do not sum to R, or weights below 0 or all 0 in a response.
    """
    policy, reference, reference_is_sums, lengths, weights, counts, branches, batch = arrays
    module(OP).preference_loss(
        _native_options(options, branches),
        batch,
        policy.numel(),
        policy.dtype == torch.float64,
        policy.data_ptr(),
        address(reference),
        reference_is_sums,
        address(lengths),
        address(weights),
        address(counts),
        loss.data_ptr(),
        address(gradient),
        table.data_ptr(),
    )


@functools.lru_cache(maxsize=64)
def _native_options(options: LossOptions, branches: tuple[str, ...]) -> object:
    native = module(OP)
    links, kinds = native.loss_links, native.loss_values
    losses = [
        (
            weight,
            [
                (
                    links.index(term.link),
                    term.weight,
                    term.scale,
                    term.offset,
                    [(kinds.index(kind), branches.index(branch), coefficient) for kind, branch, coefficient in term.values],
                )
                for term in terms
            ],
        )
        for terms, weight in zip(options.terms, options.weights, strict=True)
    ]
    return native.PreferenceLossOptions(
        losses=losses,
        beta=options.beta,
        length_normalised=options.length_normalised,
        branches=len(branches),
        chosen=branches.index("chosen"),
        rejected=branches.index("rejected"),
    )
