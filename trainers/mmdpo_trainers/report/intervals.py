"""Confidence intervals for accuracies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Proportion:
    """`correct` successes out of `total`, with a Wilson score interval (Wilson 1927, JASA 22:209)."""

    correct: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.total or self.total == 0:
            raise ValueError(f"correct/total: expected 0 <= correct <= total and total > 0, got {self.correct}/{self.total}")

    @property
    def value(self) -> float:
        return self.correct / self.total

    @property
    def low(self) -> float:
        return self._wilson()[0]

    @property
    def high(self) -> float:
        return self._wilson()[1]

    def _wilson(self) -> tuple[float, float]:
        n, p, z2 = self.total, self.value, Z95 * Z95
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        # At 0 and 1 the interval ends at the value itself, which rounding could miss by a hair.
        return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


@dataclass(frozen=True)
class Change:
    """Mean difference of paired outcomes and its normal 95 % interval, as fractions."""

    value: float
    low: float
    high: float


def paired_change(before: Mapping[str, bool], after: Mapping[str, bool]) -> Change | None:
    """Accuracy after minus before on the questions that both answered; None with fewer than two of them.

    Pairing by question removes the difficulty of the questions from the interval, which two Wilson intervals do not.
    """
    shared = before.keys() & after.keys()
    n = len(shared)
    if n < 2:
        return None
    differences = [int(after[key]) - int(before[key]) for key in shared]
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    half = Z95 * math.sqrt(variance / n)
    return Change(mean, max(-1.0, mean - half), min(1.0, mean + half))
