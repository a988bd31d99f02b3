"""95 % confidence intervals of shares, of means, and of differences between models that were asked the same."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
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
class Estimate:
    """A mean, or a difference of two, and the ends of its interval."""

    value: float
    low: float
    high: float


Outcomes = Mapping[str, bool]
"""Question id -> whether it was answered right."""


def mean_estimate(values: Sequence[float]) -> Estimate | None:
    """Mean with its normal interval; None with fewer than two values."""
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    half = Z95 * statistics.stdev(values, mean) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def paired_difference(first: Mapping[str, float], second: Mapping[str, float]) -> Estimate | None:
    """Mean of `second` minus `first` over the ids that both have; None with fewer than two of them.

    Pairing takes what the records themselves differ in out of the interval, which two separate intervals do not.
    """
    return mean_estimate([second[key] - first[key] for key in first if key in second])


def paired_change(first: Outcomes, second: Outcomes) -> Estimate | None:
    """Accuracy of `second` minus that of `first` on the questions that both answered; None with fewer than two of them.

    The interval is the adjusted Wald interval of Bonett and Price (2012, Journal of Educational and Behavioral Statistics 37:479): each
    of both kinds of change counts once more than it was seen, so that models that answer alike do not have an interval of no width.
    """
    return mean_change([(first, second)])


def mean_change(groups: Sequence[tuple[Outcomes, Outcomes]]) -> Estimate | None:
    """The same averaged over groups of questions, each of which counts the same; None where a group has fewer than two questions."""
    value = centre = variance = 0.0
    for first, second in groups:
        shared = first.keys() & second.keys()
        n = len(shared)
        if n < 2:
            return None
        gained = sum(second[key] and not first[key] for key in shared)
        lost = sum(first[key] and not second[key] for key in shared)
        up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
        value += (gained - lost) / n
        centre += up - down
        variance += (up + down - (up - down) ** 2) / (n + 2)
    if not groups:
        return None
    k = len(groups)
    value, centre, half = value / k, centre / k, Z95 * math.sqrt(variance) / k
    return Estimate(value, max(-1.0, min(value, centre - half)), min(1.0, max(value, centre + half)))
