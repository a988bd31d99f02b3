"""What a library of variable-length flash attention is to the backend, and why one cannot serve a call."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .plan import Call

Functions = Callable[[], Any]
"""What gives the object that a library's functions are attributes of; the same ones are installed, or come from the Hub."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What else a call is made with."""

    scale: float
    softcap: float | None
    window: int | None
    """Keys that a query sees at most, counted back along its path, itself included."""

    def sides(self, call: Call) -> tuple[int, int]:
        """Keys seen to the left and right of a query's own; -1 is all."""
        if not call.causal:
            return -1, -1  # the plan has cut the keys
        return (-1 if self.window is None else self.window - 1), 0


@dataclass(frozen=True, kw_only=True)
class Library:
    """One library; names it lacks are reported by `unavailable_reason`, not raised on import."""

    name: str
    unavailable_reason: Callable[[str, torch.dtype, int, bool], str | None]
    """(device type, dtype, head dim, softcap used) -> why it cannot serve, or None."""
    forward: Callable[[Tensor, Tensor, Tensor, Call, Options], tuple[Tensor, Tensor]]
    """-> output (Tq, Hq, D), lse (Hq, Tq)."""
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Call, Options], tuple[Tensor, Tensor, Tensor]]
    """(grad of output, query, key, value, output, lse, call, options) -> gradients of query, key, value."""


def wrong_tensors(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why no library at all takes such tensors, or None."""
    if device_type != "cuda":
        return f"variable-length flash attention runs on cuda tensors, got {device_type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"variable-length flash attention takes float16 and bfloat16, got {dtype}"
    if head_dim % 8 or head_dim > 256:
        return f"variable-length flash attention takes head dims up to 256 that are multiples of 8, got {head_dim}"
    return None


def needs(
    lacks: Callable[[], str | None], *, gpus: tuple[int, int], largest: int = 256, has_softcap: bool = False
) -> Callable[[str, torch.dtype, int, bool], str | None]:
    """An `unavailable_reason`, for GPUs of these major compute capabilities and head dims up to `largest`.

    lacks: what it lacks, or None; asked last, where the rest fits, because it imports the library.
    """

    def unavailable_reason(device_type: str, dtype: torch.dtype, head_dim: int, softcap: bool) -> str | None:
        reason = wrong_tensors(device_type, dtype, head_dim)
        if reason is not None:
            return reason
        major = torch.cuda.get_device_capability()[0]
        if not gpus[0] <= major <= gpus[1]:
            return f"is used on GPUs of compute capability {gpus[0]}.x to {gpus[1]}.x, this one has {major}.x"
        if head_dim > largest:
            return f"is used up to head dim {largest}, got {head_dim}"
        if softcap and not has_softcap:
            return "has no softcap"
        return lacks()

    return unavailable_reason


@functools.cache
def missing(module: str, *names: str) -> str | None:
    """Why these names of an installed module cannot be had, or None; found out once in a process."""
    try:
        found = importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # a library built for another PyTorch fails in all these ways
        return f"cannot be imported ({error})"
    lacking = [name for name in names if not hasattr(found, name)]
    return f"this version of {module} has no {', '.join(lacking)}" if lacking else None
