"""Ops choose their own precision: autocast would round the matrix products inside a backend to half precision."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def without_autocast(function: FunctionT) -> FunctionT:
    """Run the forward or backward of an autograd function with autocast off."""

    @wraps(function)
    def wrapper(ctx: Any, *args: Any) -> Any:
        device = next((arg.device.type for arg in args if isinstance(arg, Tensor)), "cpu")
        with autocast_off(device):
            return function(ctx, *args)

    return cast(FunctionT, wrapper)


def autocast_to(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, as PyTorch casts what goes into its products, float64 apart; else as they are."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def autocast_off(device_type: str) -> AbstractContextManager[object]:
    """A block without autocast; nothing where it is off already."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()
