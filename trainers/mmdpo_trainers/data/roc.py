"""Area under the ROC curve: how well a number tells right answers from wrong ones, whatever the threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Area:
    """The share of (right, wrong) pairs in which the right answer has the larger number, ties counting half; .5 says nothing.

    low, high: DeLong's normal 95 % interval (DeLong, DeLong and Clarke-Pearson 1988, Biometrics 44:837), cut off at 0 and 1; it has no
    width where the two kinds do not overlap. right, wrong: how many answers of each there were.
    """

    value: float
    low: float
    high: float
    right: int
    wrong: int


def area(right: Sequence[np.ndarray], wrong: Sequence[np.ndarray]) -> Area | None:
    """The area over strata: pairs are made inside a stratum only, and all pairs count alike.

    right, wrong: per stratum the numbers (n,) of right and of wrong answers; NaN is left out. Strata with fewer than two of either say
    nothing; None where none is left. With one stratum equal to `sklearn.metrics.roc_auc_score`.
    """
    found = [parts for one, other in zip(right, wrong, strict=True) if (parts := _parts(one, other)) is not None]
    if not found:
        return None
    counts = [(m, n) for _, _, m, n in found]
    pairs = np.array([m * n for m, n in counts], np.float64)
    weights = pairs / pairs.sum()
    value = float(weights @ [value for value, *_ in found])
    half = Z95 * math.sqrt(float(weights**2 @ [variance for _, variance, *_ in found]))
    sums = sum(m for m, _ in counts), sum(n for _, n in counts)
    return Area(value, max(0.0, value - half), min(1.0, value + half), *sums)


def _parts(right: np.ndarray, wrong: np.ndarray) -> tuple[float, float, int, int] | None:
    """Area, its variance, and both counts, of one stratum."""
    right, wrong = (np.asarray(each, np.float64) for each in (right, wrong))
    right, wrong = right[~np.isnan(right)], wrong[~np.isnan(wrong)]
    m, n = len(right), len(wrong)
    if m < 2 or n < 2:
        return None
    over = _placed(right, np.sort(wrong))
    under = 1 - _placed(wrong, np.sort(right))
    return float(over.mean()), float(over.var(ddof=1) / m + under.var(ddof=1) / n), m, n


def _placed(values: np.ndarray, sorted_others: np.ndarray) -> np.ndarray:
    """Of each value the share of the others that it is larger than, those equal to it counting half."""
    below, up_to = (np.searchsorted(sorted_others, values, side=side) for side in ("left", "right"))
    return (below + up_to) / (2 * len(sorted_others))


def youden(right: np.ndarray, wrong: np.ndarray) -> float:
    """The threshold t with the largest (share of wrong answers under t) - (share of right answers under t) (Youden 1950, Cancer 3:32).

    "Under" is `<`. It lies halfway between two neighbouring numbers; the lowest of several that do as well. NaN must be left out before.
    """
    values = np.unique(np.concatenate([right, wrong]))
    cuts = np.append((values[:-1] + values[1:]) / 2, values[-1] + 1e-6)
    under = [np.searchsorted(np.sort(each), cuts, side="left") / len(each) for each in (wrong, right)]
    return float(cuts[int(np.argmax(under[0] - under[1]))])
