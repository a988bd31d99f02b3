"""Checkpointed activations kept in the CPU's memory between forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu

_FUNCTION = "_gradient_checkpointing_func"


def offload_checkpoints(model: nn.Module) -> int:
    """Let gradient checkpointing keep on the CPU what it keeps: the inputs of its layers. Returns how many layers do.

    Only the call that stores these inputs is inside `save_on_cpu`: what a layer saves while backward runs it again stays where it is. The
    numbers are those without, bit for bit.
    """
    layers = [module for module in model.modules() if callable(module.__dict__.get(_FUNCTION)) and module.gradient_checkpointing]
    for layer in layers:
        function: Any = layer.__dict__[_FUNCTION]
        if not isinstance(function, _Offloaded):
            layer.__dict__[_FUNCTION] = _Offloaded(function)
    return len(layers)


class _Offloaded:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with save_on_cpu(pin_memory=torch.cuda.is_available()):
            return self.function(*args, **kwargs)
