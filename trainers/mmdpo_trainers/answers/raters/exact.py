"""Ratings by the truth itself: for data whose answers are exact, and as the perfect judge that others are held to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rapidfuzz.distance import Levenshtein

from mmdpo_trainers.answers.raters.rating import Rating
from mmdpo_trainers.config.sections.rating import RateConfig
from mmdpo_trainers.data.match import is_right, normalize_answer


class ExactRater:
    """Every attribute is the highest rating for an answer that says what the truth says (`data.match.is_right`).

    For a wrong one it is the closeness of the normalised texts (1 - Levenshtein distance over the longer length) of the way from the
    lowest rating to the middle, so that no wrong answer comes near a right one; of an answer of which nobody can tell, the same.
    """

    def __init__(self, options: RateConfig) -> None:
        self._options = options

    @property
    def attributes(self) -> tuple[str, ...]:
        return tuple(self._options.attributes)

    def rate(self, records: Sequence[Mapping[str, Any]], responses: Sequence[Sequence[str]]) -> list[list[Rating]]:
        return [[self._rating(record, text) for text in texts] for record, texts in zip(records, responses, strict=True)]

    def _rating(self, record: Mapping[str, Any], response: str) -> Rating:
        truth, options = str(record.get("answer") or "").strip(), self._options
        if not truth:
            return Rating(None, "expected a record with an `answer` to compare with, got none", "no_truth")
        if is_right(response, truth, options=record.get("options"), match=options.match):
            share = 1.0
        else:
            share = Levenshtein.normalized_similarity(normalize_answer(response), normalize_answer(truth)) / 2
        value = options.lowest + share * (options.highest - options.lowest)
        return Rating({name: value for name in self.attributes})

    def close(self) -> None:
        pass
