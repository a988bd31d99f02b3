"""A model in training mode: without noise, as policy and reference must differ by the weights only, and its checkpoints on the CPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu

_RATE = re.compile("drop|jitter|noise")
_FUNCTION = "_gradient_checkpointing_func"


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability and noise level of the model to 0, attention's own included."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and _RATE.search(name):
                setattr(module, name, 0.0)


def quiet(model: nn.Module) -> None:
    """Put a model in training mode into one where it computes as in evaluation, but for what makes gradients.

    Dropout, stochastic depth, skipped layers, jittered routers and batch norms that follow the batch all look at `training`, as does the
    checkpointing of activations: modules that checkpoint stay in training, with the rates of `disable_dropout`. So do PEFT's own, whose
    noise `adapter_checks` refuses. To be called after each `train()`, as backward runs checkpointed layers again.
    """
    for module in model.modules():
        checkpoints = getattr(module, "gradient_checkpointing", False) is True
        if module is not model and not checkpoints and not type(module).__module__.startswith("peft."):
            module.training = False


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
