"""What a model does in training mode and not in evaluation: kept off, as policy and reference must differ by the weights only."""

from __future__ import annotations

import re

from torch import nn

_RATE = re.compile("drop|jitter|noise")


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
