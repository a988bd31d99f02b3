"""A training whose gradients are all zero ends at its first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mmdpo_trainers.errors import StageError
from mmdpo_trainers.processes import collectives


class NoGradientError(StageError):
    """Nothing would be trained."""


class GradientCheck(TrainerCallback):
    """Looks at the gradients of the first optimizer step, before it; all processes find the same.

    DeepSpeed takes its step within backward: there the step, which changed nothing but by weight decay, has been taken.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """NoGradientError in every process where no parameter of any process has a gradient that is not zero."""
        if state.global_step:
            return
        trained = {name: p for name, p in self.trainer.model.named_parameters() if p.requires_grad}
        if self.trainer.is_deepspeed_enabled:
            found = self.trainer.model_wrapped.get_global_grad_norm() != 0
        else:
            found = any(_not_zero(parameter) for parameter in trained.values())
        if collectives.anywhere(bool(found), args.device):
            return
        raise NoGradientError(
            f"step 1: all gradients are zero, so nothing would be trained; {len(trained)} parameters are to be, such as "
            f"{next(iter(trained), 'none')}. Either no record of the step reaches them (an adapter on the vision tower without pictures, a kind "
            "of adapter that acts outside of the layers), or the losses teach nothing (loss_weights of 0, chosen and rejected alike, "
            "hinge where all pairs keep their margin)"
        )


def connected(loss: Tensor, model: nn.Module) -> Tensor:
    """A loss that backward can start from, also where nothing that is trained took part in it: a batch without pictures, say."""
    if loss.requires_grad or not torch.is_grad_enabled():
        return loss
    parameter = next((p for p in model.parameters() if p.requires_grad), None)
    return loss if parameter is None else loss + 0 * parameter.sum().to(loss)


def _not_zero(parameter: Tensor) -> bool:
    gradient: Any = parameter.grad
    if gradient is None:
        return False
    # FSDP2's are in shards; other processes have the rest.
    own = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return bool(own.any())
