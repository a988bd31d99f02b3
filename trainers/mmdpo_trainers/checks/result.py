"""What a check says, and how near is near enough."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

_STEPS, _HALF_STEPS = 64, 16
"""Rounding steps that the same computation in another order may be off by, at the scale of its result, and in half precision."""


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """One check of one model."""

    name: str
    figure: float | None = None
    """The largest difference that was found, on the scale of what is compared; None: nothing to measure."""
    limit: float | None = None
    """The largest difference that still counts as exact."""
    verdict: str
    """"exact", "refused: <reason>", or "FAILED: <what>"."""
    detail: str = ""
    """What was compared."""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return self.verdict.startswith("FAILED")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Check = Callable[[Any], CheckResult]
"""A function of a `LoadedModel`."""


class CheckFailure(Exception):
    """A check found something that is not a matter of rounding. Its message says what."""


@dataclass
class Differences:
    """The largest relative difference of several comparisons, and where it was."""

    dtype: torch.dtype
    limit: float = 0.0
    """0: `limit_of(dtype)`."""
    largest: float = 0.0
    where: str = ""

    def __post_init__(self) -> None:
        self.limit = self.limit or limit_of(self.dtype)

    def add(self, found: Tensor, expected: Tensor, where: str, scale: float | None = None) -> None:
        """Compare two tensors. scale: what a difference is taken relative to, by default the largest expected number.

        Raises CheckFailure for other shapes, and for numbers that are not finite.
        """
        if found.shape != expected.shape:
            raise CheckFailure(f"{where}: expected shape {tuple(expected.shape)}, got {tuple(found.shape)}")
        if not expected.numel():
            return
        if not bool(torch.isfinite(expected).all()):
            # Eager attention in float64 makes NaN of padding rows that see nothing.
            raise CheckFailure(f"{where}: transformers itself gives numbers that are not finite; try --dtype float32")
        if not bool(torch.isfinite(found).all()):
            raise CheckFailure(f"{where}: got numbers that are not finite")
        found, expected = found.detach().double(), expected.detach().double()
        size = float(expected.abs().max()) if scale is None else scale
        difference = float((found - expected).abs().max()) / max(size, 1e-30)
        if difference >= self.largest:
            self.largest, self.where = difference, where

    def result(self, name: str, detail: str, refused: str | None = None) -> CheckResult:
        """The verdict: exact within the limit. refused: why a part of it is not offered, where all else must be exact."""
        if not self.largest <= self.limit:
            verdict = f"FAILED: off by {self.largest:.1e} of the scale, at most {self.limit:.1e} is rounding ({self.where})"
        else:
            verdict = "exact" if refused is None else f"refused: {refused}"
        return CheckResult(name=name, figure=self.largest, limit=self.limit, verdict=verdict, detail=detail)


def limit_of(dtype: torch.dtype) -> float:
    """The largest relative difference that is rounding. In half precision that is a lot: a check in float32 is the sharper one."""
    return (_STEPS if dtype.itemsize > 2 else _HALF_STEPS) * rounding(dtype)


def rounding(dtype: torch.dtype) -> float:
    """A rounding step; transformers' norms and rotary embeddings round float64 to float32."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def timed(name: str, check: Check, loaded: Any) -> CheckResult:
    """The check's result with its seconds; whatever it raises is a failure."""
    start = time.perf_counter()
    try:
        found = check(loaded)
    except CheckFailure as error:
        found = CheckResult(name=name, verdict=f"FAILED: {error}")
    except Exception as error:  # noqa: BLE001 - the other checks are to run all the same
        found = CheckResult(name=name, verdict=f"FAILED: {type(error).__name__}: {error}")
    return replace(found, name=name, seconds=time.perf_counter() - start)
