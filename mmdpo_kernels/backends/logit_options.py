"""From the product of hidden states and head to the logits of the softmax."""

from __future__ import annotations

from typing import NamedTuple

STATS = ("entropy", "max_logp", "is_top1", "mean_logit")
"""What a pass over the logits can give beside the log-probabilities."""


class LogitOptions(NamedTuple):
    """With z = hidden @ weight.T + bias and x = z * logit_scale, the logits are softcap * tanh(x / softcap) / temperature."""

    softcap: float | None
    """None: x / temperature."""
    logit_scale: float
    temperature: float
    ignore_index: int
    """Rows with this target have none: their log-probability, statistics and gradient are 0."""

    @property
    def slope(self) -> float:
        """Largest derivative of a logit in z, in absolute value."""
        return abs(self.logit_scale / self.temperature)
