"""Kinds of CPU, which differ in what is fastest on them: the rules of "auto" are measured on each."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from types import ModuleType

import torch

KINDS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")
"""Older ones first; a kind has the instructions of those before it. The last two multiply bfloat16, see `native/linear_logprobs_cpu.py`."""


def cpu_kind() -> str:
    """The kind of this CPU, at the level of `MMDPO_CPU_LEVEL` where that is set.

    Without the compiled module the kind is PyTorch's report, which knows no newer one than avx512.
    """
    native = compiled_module()
    if native is None:
        return _of_torch()
    try:
        level: str = native.cpu_level()
    except ValueError:  # no such level, as the native backend says where it is asked
        return _of_torch()
    if level == "avx512" and native.multiplies_bfloat16():
        return "avx512_bf16"
    # What is emulated for tests is code for any CPU.
    return level if level in KINDS else "generic"


def nearest(kind: str, among: Iterable[str]) -> str:
    """The one of `among` that is fewest steps from `kind`; of two the older."""
    at = KINDS.index(kind)
    return min(among, key=lambda other: (abs(KINDS.index(other) - at), KINDS.index(other)))


@functools.cache
def compiled_module() -> ModuleType | None:
    """`mmdpo_kernels._native`; None where it is not built, or left out with its folder, as in the copy for the Hub."""
    try:
        native = importlib.import_module(f"{__package__}.native.extension").load()
    except ImportError:
        return None
    return None if isinstance(native, str) else native


def _of_torch() -> str:
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "generic")
