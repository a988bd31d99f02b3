"""The compiled module, or why there is none; addresses as its functions take them."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

REMEDY = "wheels of mmdpo-kernels have it, and in a checkout `pip install .` builds it with a C++17 compiler"


@functools.cache
def load() -> ModuleType | str:
    """The package's `_native`, or one line that says why it cannot be imported and what to do."""
    try:
        return importlib.import_module("..._native", __package__)
    except ImportError as error:
        return f"mmdpo_kernels._native cannot be imported ({error}); {REMEDY}"


def module(op: str) -> ModuleType:
    """The compiled module, for a call that `unavailable_reason` has let through."""
    native = load()
    if isinstance(native, str):
        raise RuntimeError(f"{op}: {native}")
    return native


def cuda_reason(native: ModuleType) -> str | None:
    """None, or why the CUDA kernels cannot run on the current device."""
    if not native.cuda_targets:
        return (
            "mmdpo_kernels._native was built without CUDA, and so runs on cpu tensors; take a CUDA wheel, or build it where nvcc is on the "
            "PATH or the toolkit's folder is named in CUDA_HOME"
        )
    if not torch.cuda.is_available():
        return "torch finds no cuda device"
    return _device_reason(native, torch.cuda.current_device()) or None


@functools.cache
def _device_reason(native: ModuleType, device: int) -> str:
    reason = native.cuda_unavailable(device)
    targets = ", ".join(native.cuda_targets)
    return f"its CUDA kernels (built for {targets}) cannot run on device {device}: {reason}" if reason else ""


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
