"""What every Triton kernel file needs: where kernels can run, and how a shipped configuration is described."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret
"""TRITON_INTERPRET was set when Triton was imported: kernels run on the CPU, one program after another."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPE_NAMES = dict(zip(DTYPES, ("fp32", "fp16", "bf16"), strict=True))
"""As Triton calls them."""


@dataclass(frozen=True, kw_only=True)
class Specialization:
    """One compiled form of a kernel, as the launcher asks for it."""

    label: str
    kernel: Any
    """The `triton.jit` function."""
    signature: Mapping[str, str | tuple[str, ...]]
    """Type of each argument that is not a compile-time constant, for example `"*bf16"`, `"i32"`; of a tuple those of its items."""
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


def feature_sets(features: Sequence[str]) -> list[tuple[str, ...]]:
    """Every set of them, the smallest first: what the compiler is asked for, as more features do not always take more registers."""
    return [names for count in range(len(features) + 1) for names in itertools.combinations(features, count)]


def distinct(forms: Iterable[Specialization]) -> list[Specialization]:
    """Each compiled form once, under the first of its labels."""
    found: dict[object, Specialization] = {}
    for form in forms:
        written = map(str, (form.signature, form.constants, form.num_warps, form.num_stages, form.maxnreg))
        found.setdefault((form.kernel, *written), form)
    return list(found.values())


def unavailable_reason(device_type: str, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot serve tensors of `dtype` on `device_type`, or None."""
    if device_type != "cuda" and not (device_type == "cpu" and INTERPRETED):
        return f"it runs on cuda tensors (on cpu only interpreted, with TRITON_INTERPRET=1 set before import), got {device_type}"
    if device_type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or newer, this one has {torch.cuda.get_device_capability()}"
    if dtype not in DTYPES:
        return f"it takes float32, float16 and bfloat16, got {dtype}"
    return None


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (8, 0) where kernels are interpreted."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
