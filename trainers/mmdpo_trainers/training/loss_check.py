"""A loss that is not finite ends training before it reaches the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

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
        if not collectives.anywhere(bool(self._found), device):
            return
        found = [text for texts in collectives.gathered(self._found) for text in texts]
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
