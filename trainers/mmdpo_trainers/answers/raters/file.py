"""Ratings of the user's own, from a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.answers.raters.rating import Rating
from mmdpo_trainers.config.sections.rating import RateConfig
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.files.json_lines import read_jsonl


class FileRater:
    """Ratings by record and answer: lines of `id` and `ratings`, a mapping of attributes to numbers (or null) for each answer in turn.

    A line may hold `responses`, the texts that were rated, one a rating: an answer is then looked up by its text, in any order.
    DataError, naming file and record, for a line that is something else.
    """

    def __init__(self, options: RateConfig) -> None:
        self._options, self._path = options, Path(str(options.file))
        self._lines: dict[str, tuple[list[Rating], list[str] | None]] = {}
        for number, line in enumerate(read_jsonl(self._path), start=1):
            where = f"rate.file: {self._path}, line {number}"
            if not isinstance(line.get("id"), str) or not isinstance(line.get("ratings"), list):
                raise DataError(f"{where}: expected `id` (text) and `ratings` (a list), got the keys {', '.join(line)}")
            if line["id"] in self._lines:
                raise DataError(f"{where}: id {line['id']!r} occurs twice; leave one of them")
            texts = line.get("responses")
            if texts is not None and (not isinstance(texts, list) or len(texts) != len(line["ratings"])):
                raise DataError(f"{where}: responses must hold a text for each of {len(line['ratings'])} ratings, got {texts!r}")
            self._lines[line["id"]] = (
                [self._read(each, f"{where}, rating {place}") for place, each in enumerate(line["ratings"])],
                texts,
            )

    @property
    def attributes(self) -> tuple[str, ...]:
        return tuple(self._options.attributes)

    def rate(self, records: Sequence[Mapping[str, Any]], responses: Sequence[Sequence[str]]) -> list[list[Rating]]:
        return [self._of(record, texts) for record, texts in zip(records, responses, strict=True)]

    def _of(self, record: Mapping[str, Any], responses: Sequence[str]) -> list[Rating]:
        ratings, texts = self._lines.get(record["id"], ([], None))
        if texts is not None:
            by_text = dict(zip(texts, ratings, strict=True))
            return [by_text.get(text, _absent(record, self._path)) for text in responses]
        if ratings and len(ratings) != len(responses):
            raise DataError(
                f"rate.file: {self._path}, record {record['id']!r}: expected a rating for each of {len(responses)} answers, got "
                f"{len(ratings)}; add `responses`, the texts that they are of"
            )
        return ratings or [_absent(record, self._path)] * len(responses)

    def _read(self, given: Any, where: str) -> Rating:
        if given is None:
            return Rating(None, f"{where}: null", "not_rated")
        options = self._options
        if not isinstance(given, dict):
            raise DataError(f"{where}: expected a mapping of {', '.join(options.attributes)} to numbers, or null, got {given!r}")
        for name in options.attributes:
            value: Any = given.get(name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not options.lowest <= value <= options.highest:
                raise DataError(
                    f"{where}: {name}: expected a number from {options.lowest:g} to {options.highest:g}, got {value!r}; mend it, or set "
                    "rate.attributes, rate.lowest and rate.highest to those of the file"
                )
        return Rating({name: float(given[name]) for name in options.attributes})

    def close(self) -> None:
        pass


def _absent(record: Mapping[str, Any], path: Path) -> Rating:
    return Rating(None, f"{path} has no rating of this answer to record {record['id']!r}", "not_rated")
