"""Which records are online in a step, and which of their answers become a pair."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmdpo_trainers.config.sections.online import OnlineConfig
from mmdpo_trainers.data.seeds import batch_seed

Outcome = Literal["pair", "tie", "unrated", "cut"]
"""What came of a record's answers: a pair; ratings too close; ratings that lack; no answer that ended by itself and says something."""


def is_online(alpha: float, seed: int, step: int, name: str) -> bool:
    """A draw from Bernoulli(alpha) that follows from seed, step and the record's name alone: mixed DPO of arXiv 2407.02477."""
    return random.Random(batch_seed(seed, "online", step, name)).random() < alpha


@dataclass(frozen=True)
class Answer:
    """An answer of the policy. `usable`: it can be a response of a training record."""

    text: str
    tokens: int
    """The end token, where there is one, included."""
    ended: bool
    usable: bool = True


def values_of(answers: Sequence[Answer], ratings: Sequence[float | None], penalty: float | None) -> list[float | None]:
    """Ratings with the penalty for a missing end token; None for answers that are not rated or not usable."""
    return [
        None if rating is None or not answer.usable else rating - (0.0 if answer.ended else penalty or 0.0)
        for answer, rating in zip(answers, ratings, strict=True)
    ]


def choose(answers: Sequence[Answer], values: Sequence[float | None], min_gap: float) -> tuple[Outcome, int | None, int | None]:
    """What came of the answers, and the indices of the chosen and the rejected one: the best against the worst, the first of equals.

    Chosen is never an answer that was cut, or that is empty: an end token would be put behind it, and learnt.
    TRL's OnlineDPOTrainer takes the first answer of a tie as the better one; here ties make no pair.
    """
    rated = [index for index, value in enumerate(values) if value is not None]
    if len(rated) < 2:
        return "unrated", None, None
    whole = [index for index in rated if answers[index].ended and answers[index].text.strip()]
    if not whole:
        return "cut", None, None
    best = max(whole, key=lambda index: (values[index], -index))
    worst = min(rated, key=lambda index: (values[index], index))
    return ("pair", best, worst) if _differ(answers, values, best, worst, min_gap) else ("tie", None, None)


def choose_negative(
    answers: Sequence[Answer], values: Sequence[float | None], chosen: str, rating: float | None, min_gap: float
) -> tuple[Outcome, int | None]:
    """What came of the answers beside a chosen response that is there, and the index of the worst, where it is rated below that."""
    rated = [index for index, value in enumerate(values) if value is not None]
    if not rated or rating is None:
        return "unrated", None
    worst = min(rated, key=lambda index: (values[index], index))
    with_chosen, of_all = [*answers, Answer(chosen, 0, True)], [*values, rating]
    return ("pair", worst) if _differ(with_chosen, of_all, len(answers), worst, min_gap) else ("tie", None)


def _differ(answers: Sequence[Answer], values: Sequence[float | None], best: int, worst: int, min_gap: float) -> bool:
    high, low = values[best], values[worst]
    assert high is not None and low is not None
    return high > low and high - low >= min_gap and answers[best].text.strip() != answers[worst].text.strip()


def check_options(options: OnlineConfig) -> None:
    """ValueError naming a setting that a configuration made in code has wrong."""
    if options.alpha is None or not 0 <= options.alpha <= 1:
        raise ValueError(f"online.alpha: expected a probability from 0 to 1, got {options.alpha}")
    least = 1 if options.use == "negative" else 2
    if options.samples < least:
        raise ValueError(f"online.samples: expected {least} or more, got {options.samples}; a pair is made of two answers")
