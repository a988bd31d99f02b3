"""What a rater is, and what it says of an answer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mmdpo_trainers.models.template_date import TemplateDate


@dataclass(frozen=True)
class Rating:
    """What was said of one answer: a number for each attribute, or why there is none."""

    scores: Mapping[str, float] | None
    """Attribute -> value."""
    problem: str | None = None
    """Why there are no scores: what was expected and what came."""
    reason: str | None = None
    """The same as a word to count by."""

    def value(self, attribute: str | None = None) -> float | None:
        """The value of one attribute, or the mean over all of them; None where there is no rating."""
        if self.scores is None:
            return None
        return statistics.fmean(self.scores.values()) if attribute is None else self.scores[attribute]


class Rater(Protocol):
    """Rates answers, in a fixed order of attributes."""

    @property
    def attributes(self) -> tuple[str, ...]: ...

    def rate(self, records: Sequence[Mapping[str, Any]], responses: Sequence[Sequence[str]]) -> list[list[Rating]]:
        """One list a record, one Rating an answer.

        records: with `id`, `prompt` (a `<image>` for each picture), `images`, and where known `answer`, `options`, `caption`.
        responses: the answers to each.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a rater is not told by the section `rate`: where it keeps its files and runs its model."""

    folder: Path
    """Where a judge's replies are kept, so that nothing is asked twice."""
    device: str = "auto"
    dtype: str = "auto"
    date: TemplateDate = field(default_factory=TemplateDate.now)
    allow_missing: bool = False
    """Go on without ratings that an endpoint does not give after all repetitions; False: StageError."""
    most_images: int = 8
    """Of one record; vLLM wants to know."""
