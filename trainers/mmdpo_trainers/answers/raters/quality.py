"""Is a rater any good: does it rate the better answer of a pair higher, and does the order of two answers change what a judge says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmdpo_trainers.answers.raters.judge import Judge
from mmdpo_trainers.answers.raters.parsing import Choice
from mmdpo_trainers.answers.raters.rating import Rater

WORDS = {
    "agree": "better answer rated higher",
    "tied": "both rated the same",
    "consistent": "same answer preferred in both orders",
    "compared_agree": "better answer preferred in both orders",
    "first": "first answer preferred",
}
"""Figures of `quality_counts` in words."""


@dataclass(frozen=True, kw_only=True)
class RatedPair:
    """A pair of which the better answer is known, and what a rater says of it."""

    chosen: float | None
    rejected: float | None
    """Value of each answer's rating; None: not rated."""
    forward: Choice | None = None
    """Which a judge takes where the better answer is A; None where it was not asked, or gave no reply that can be read."""
    backward: Choice | None = None
    """The same where the better answer is B."""


def rate_pairs(
    rater: Rater,
    records: Sequence[Mapping[str, Any]],
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int,
    advance: Callable[[int], None],
) -> list[RatedPair]:
    """Have pairs of (better answer, worse answer) rated, and by a `Judge` compared, in both orders.

    records: what each pair answers. advance: called with the number of pairs done.
    """
    done: list[RatedPair] = []
    for start in range(0, len(pairs), batch_size):
        batch, some = list(pairs[start : start + batch_size]), records[start : start + batch_size]
        values = [[rating.value() for rating in ratings] for ratings in rater.rate(some, batch)]
        orders: list[list[Choice | None]] = [[None] * len(batch)] * 2
        if isinstance(rater, Judge):
            orders = [rater.compare(some, batch), rater.compare(some, [(worse, better) for better, worse in batch])]
        done += [
            RatedPair(chosen=chosen, rejected=rejected, forward=forward, backward=backward)
            for (chosen, rejected), forward, backward in zip(values, *orders, strict=True)
        ]
        advance(len(batch))
    return done


def quality_counts(pairs: Sequence[RatedPair]) -> dict[str, tuple[int, int]]:
    """Figure -> (how many, of how many); without those of which there are none.

    - agree: pairs whose better answer is rated higher, of those with both ratings. A tie is no agreement.
    - tied: equal ratings, of the same.
    - consistent: pairs of which the same answer is taken in both orders (or a tie in both), of those compared in both.
    - compared_agree: pairs whose better answer is taken in both orders, of the same.
    - first: comparisons that take the first answer, whichever it is, of all; half is no preference for a place.
    """
    both = [(pair.chosen, pair.rejected) for pair in pairs if pair.chosen is not None and pair.rejected is not None]
    orders = [(pair.forward, pair.backward) for pair in pairs if pair.forward is not None and pair.backward is not None]
    swapped = {"A": "B", "B": "A", "tie": "tie"}
    counts = {
        "agree": (sum(chosen > rejected for chosen, rejected in both), len(both)),
        "tied": (sum(chosen == rejected for chosen, rejected in both), len(both)),
        "consistent": (sum(swapped[forward] == backward for forward, backward in orders), len(orders)),
        "compared_agree": (sum(order == ("A", "B") for order in orders), len(orders)),
        "first": (sum(order.count("A") for order in orders), 2 * len(orders)),
    }
    return {name: count for name, count in counts.items() if count[1]}
