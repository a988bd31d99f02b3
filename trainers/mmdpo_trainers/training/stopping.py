"""What ends a training: a loss that is not finite, before it reaches the weights, and a first step whose gradients are all zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mmdpo_trainers.errors import StageError
from mmdpo_trainers.processes import collectives


class NonFiniteLossError(StageError):
    """A loss of NaN or infinity."""


class LossCheck:
    """Looks at the loss of every micro-batch, and stops all processes together before the optimizer step.

    Processes that wait for each other's gradients must not end alone: what one of them found is told at the last micro-batch of the step, before
    its backward pass, by which time no gradient has reached the weights.
    """

    def __init__(self) -> None:
        self._found: list[str] = []

    def look(self, loss: Tensor, ids: Sequence[str], parts: Mapping[str, Tensor]) -> None:
        """Note a micro-batch's loss if it is not finite. parts: what it is made of, per record or as one number."""
        if math.isfinite(loss.item()):
            return
        named = ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
        shown = ", ".join(f"{name} {_shown(value)}" for name, value in parts.items())
        self._found.append(f"record{'s' if len(ids) > 1 else ''} {named}: loss {loss.item()} ({shown})")

    def stop(self, step: int, device: torch.device, kept: Callable[[], str]) -> None:
        """NonFiniteLossError in every process if one of them noted a loss. kept: what the message says of checkpoints."""
        if not collectives.any_rank(bool(self._found), device):
            return
        found = [text for texts in collectives.all_gather(self._found) for text in texts]
        self._found = []
        raise NonFiniteLossError(
            f"step {step}: the loss is not finite; {'; '.join(found)}. The step was not taken; {kept()}. Look at these records, lower "
            "learning_rate or beta, or use a wider number type; stop_on_nonfinite_loss=False goes on regardless"
        )


def _shown(value: Tensor) -> str:
    numbers = value.flatten().tolist()
    bad = [number for number in numbers if not math.isfinite(number)]
    if bad and len(numbers) > 1:
        return f"{bad[0]} in {len(bad)} of {len(numbers)}"
    return f"{sum(numbers) / max(len(numbers), 1):.4g}"


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
        online = self.trainer.online
        if state.global_step or (online is not None and online.nothing_to_learn):
            return
        trained = {name: p for name, p in self.trainer.model.named_parameters() if p.requires_grad}
        if self.trainer.is_deepspeed_enabled:
            found = self.trainer.model_wrapped.get_global_grad_norm() != 0
        else:
            found = any(_not_zero(parameter) for parameter in trained.values())
        if collectives.any_rank(bool(found), args.device):
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
