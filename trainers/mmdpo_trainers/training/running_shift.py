"""BCO's reward shift in training: a running mean of the rewards, over processes and micro-batches."""

from __future__ import annotations

import math

import torch

from mmdpo_trainers.processes import collectives

SHIFTS = ("none", "previous", "present")
"""Ways to take it, see `RunningShift`."""


class RunningShift:
    """The shift s of "bco_pair": the mean of (beta w + beta l) / 2 so far, with w and l as in `mmdpo_kernels.losses`.

    - `none`: 0, as TRL's DPOTrainer has it.
    - `previous`: the mean over the records of all optimizer steps before this one, 0 in the first. So MPO's paper says it ("the moving
      average of previous rewards", arXiv 2411.10442), and it does not depend on how records fall into micro-batches and processes.
    - `present`: a mean over micro-batches, each counting alike whatever its size, the one at hand and those of other processes taken in before
      their loss is made. So MPO's released code has it, by TRL's RunningMoments; but in evaluation, which takes nothing in here.

    All processes call `take` and `step` together.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._total = self._weight = 0.0
        self._waiting = [0.0, 0.0]
        """Sum and number of what was seen since the last step."""

    @property
    def value(self) -> float:
        """s, in units of reward."""
        return self._total / self._weight if self._weight else 0.0

    def take(self, rewards: float, count: int, device: torch.device) -> None:
        """Take in a micro-batch. rewards: mean of (beta w + beta l) / 2; count: its records, 0 for one that repeats others.

        Rewards that are not finite are passed over: one such batch would spoil the mean for good.
        """
        if not math.isfinite(rewards):
            rewards, count = 0.0, 0
        if self.kind == "present":
            weight = float(count > 0)
            self._add(*collectives.all_reduce([rewards * weight, weight], device))
        elif self.kind == "previous":
            self._waiting = [self._waiting[0] + rewards * count, self._waiting[1] + count]

    def step(self, device: torch.device) -> None:
        """The optimizer step's last micro-batch has been taken in."""
        if self.kind == "previous":
            self._add(*collectives.all_reduce(self._waiting, device))
            self._waiting = [0.0, 0.0]

    def _add(self, total: float, weight: float) -> None:
        self._total, self._weight = self._total + total, self._weight + weight

    def state(self) -> list[float]:
        """JSON-able state for a checkpoint, between steps; the same in all processes."""
        return [self._total, self._weight]

    def load(self, state: list[float] | None) -> None:
        """Put `state()` back; None: a checkpoint that has none."""
        self._total, self._weight = state or (0.0, 0.0)
