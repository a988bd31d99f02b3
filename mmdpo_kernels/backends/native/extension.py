"""The compiled module, or why there is none; tensors as its functions take them."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor


@functools.cache
def load() -> ModuleType | str:
    """`mmdpo_kernels._native`, or one line that says why it cannot be imported and what to do."""
    try:
        return importlib.import_module("mmdpo_kernels._native")
    except ImportError as error:
        return f"mmdpo_kernels._native cannot be imported ({error}); build it with `make install` or `pip install -e .`"


def module(op: str) -> ModuleType:
    """The compiled module, for a call that `unavailable_reason` has let through."""
    native = load()
    if isinstance(native, str):
        raise RuntimeError(f"{op}: {native}")
    return native


def dense_heads(tensor: Tensor) -> Tensor:
    """The kernels read each head vector as consecutive elements; other strides may be anything."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def int32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.int32).contiguous()


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
