"""Which answers become rejected answers: MIA-DPO's rules, and the control arms' draws. Pure functions on score records.

Source: MIA-DPO (arXiv 2410.17637) and its released code (Liuziyu77/MIA-DPO).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from rapidfuzz.distance import Levenshtein

from mmdpo_trainers.config.options import Match
from mmdpo_trainers.data.conversation import TEMPLATE_COLUMNS, read_prompt
from mmdpo_trainers.data.match import is_right, normalize_answer, say_option
from mmdpo_trainers.data.roc import youden
from mmdpo_trainers.data.seeds import batch_seed

Record = dict[str, Any]
Thresholds = dict[str, dict[int, float]]
Ratios = Mapping[tuple[str, int], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Format and number of pictures -> the attention ratios of all answers, of right ones and of wrong ones, where that can be told."""

_REGION_THRESHOLDS: Thresholds = {"grid": {2: 0.7, 3: 0.6, 4: 0.5, 6: 0.4, 9: 0.3}, "pip": {2: 0.8}}

THRESHOLDS: dict[str, Thresholds] = {
    # The paper gives numbers for sequences only; collage and pic-in-pic are the released code's in both presets.
    "paper": {"sequence": {2: 0.7, 3: 0.6, 4: 0.5, 5: 0.5}, **_REGION_THRESHOLDS},
    "official_code": {"sequence": {2: 0.8, 3: 0.7, 4: 0.6, 5: 0.6}, **_REGION_THRESHOLDS},
    "custom": {},
}
"""Preset -> format -> number of pictures -> threshold of the attention ratio."""

POST_SELECTION: dict[str, tuple[float | None, float | None]] = {
    "paper": (5.0, 0.1),
    "official_code": (None, None),
    "custom": (5.0, 0.1),
}
"""Preset -> (largest length ratio, smallest edit distance).

The paper names both rules without cut-offs, the code has neither. A length ratio above 5 teaches length rather than content, and
texts that differ in under a tenth of their characters are one answer written twice.
"""

MATCH: dict[str, Match] = {"paper": "contains", "official_code": "exact", "custom": "contains"}
"""Preset -> how an answer is compared with the truth. The code compares the texts; "The picture shows a cat." is no wrong answer, though."""

RULES = (
    "no_truth",
    "empty_response",
    "no_threshold",
    "no_ratio",
    "ratio",
    "no_rating",
    "rating",
    "answer",
    "unclear",
    "perplexity",
    "truth_length",
    "length_ratio",
    "edit_distance",
    "no_wrong_answer",
    "not_drawn",
)
"""Names of the reasons for dropping a record, in the order they are looked at."""


@dataclass(frozen=True, kw_only=True)
class SelectionRules:
    """What an answer must fulfil to become a rejected answer."""

    thresholds: Thresholds = field(default_factory=dict)
    inclusive: frozenset[str] = frozenset()
    """Formats whose ratio may equal the threshold (the code: sequence `<=`, grid and pip `<`); elsewhere it must be smaller."""
    attention: bool = True
    """False leaves the attention ratio out (control arms)."""
    max_rating: float | None = None
    """With a number a judge decides which answers are wrong, by `rating` of the record; then the truth does not."""
    match: Match = "contains"
    """How answers are compared with the truth, see `is_right`."""
    min_perplexity: float | None = 1.1
    max_truth_chars: int | None = 512
    max_length_ratio: float | None = 5.0
    min_edit_distance: float | None = 0.1

    @classmethod
    def from_options(
        cls, options: Any, ratios: Ratios = MappingProxyType({}), *, attention: bool = True, judged: bool = False
    ) -> SelectionRules:
        """From a `SelectConfig`, and the ratios of the score records, which thresholds may come from; `attention=False` for the control
        arms, `judged` for that of a judge."""
        table = THRESHOLDS[options.preset] if options.quantile is None else thresholds_of(ratios, options.quantile)
        length_ratio, edit_distance = POST_SELECTION[options.preset]
        return cls(
            thresholds={name: {**table.get(name, {}), **options.thresholds.get(name, {})} for name in table | options.thresholds},
            inclusive=frozenset({"sequence"} if options.preset == "official_code" else ()),
            attention=attention,
            max_rating=options.max_rating if judged else None,
            match=match_of(options),
            min_perplexity=options.min_perplexity,
            max_truth_chars=options.max_truth_chars,
            max_length_ratio=length_ratio if options.max_length_ratio == "preset" else options.max_length_ratio,
            min_edit_distance=edit_distance if options.min_edit_distance == "preset" else options.min_edit_distance,
        )

    def failing(self, record: Mapping[str, Any]) -> list[str]:
        """Names of all rules a score record fails, in the order of `RULES`; empty: its answer becomes a rejected answer.

        - ratio: the attention ratio is not under the threshold of the format and number of pictures (`no_threshold`: there is
          none; `no_ratio`: the answer had no row to score).
        - rating: the judge rated the answer above `max_rating`; no_rating: it gave none.
        - answer: the response says what the truth says (`is_right`, as `match` says); unclear: it cannot be told whether it does. A judge
          decides that in their place; but an answer that is the truth word for word is never rejected.
        - perplexity: exp(-mean log max p) at or under `min_perplexity`: the model hardly hesitated.
        - truth_length: the truth has `max_truth_chars` characters or more.
        - length_ratio: longer over shorter of truth and response, in characters, above `max_length_ratio`.
        - edit_distance: Levenshtein distance of the normalised texts over the longer one's length under `min_edit_distance`.
        """
        truth, response = (str(record.get(key) or "").strip() for key in ("answer", "response"))
        failed = [name for name, fails in (("no_truth", not truth), ("empty_response", not response)) if fails]
        if self.attention and (reason := self.attention_reason(record["format"], record["num_images"], record["ratio"])):
            failed.append(reason)
        if self.max_rating is not None and (record["rating"] is None or record["rating"] > self.max_rating):
            failed.append("no_rating" if record["rating"] is None else "rating")
        if not truth or not response:
            return failed
        right = self._right(response, truth, record.get("options"))
        if right is not False:
            failed.append("answer" if right else "unclear")
        if self.min_perplexity is not None and record["perplexity"] <= self.min_perplexity:
            failed.append("perplexity")
        if self.max_truth_chars is not None and len(truth) >= self.max_truth_chars:
            failed.append("truth_length")
        lengths = sorted((len(truth), len(response)))
        if self.max_length_ratio is not None and lengths[1] / lengths[0] > self.max_length_ratio:
            failed.append("length_ratio")
        distance = Levenshtein.normalized_distance(normalize_answer(truth), normalize_answer(response))
        if self.min_edit_distance is not None and distance < self.min_edit_distance:
            failed.append("edit_distance")
        return failed

    def _right(self, response: str, truth: str, options: Sequence[str] | None) -> bool | None:
        if self.max_rating is not None:
            return normalize_answer(response) == normalize_answer(truth)
        return is_right(response, truth, options=options, match=self.match)

    def attention_reason(self, format: str, num_images: int, ratio: float | None) -> str | None:
        """The rule that a ratio fails."""
        threshold = self.thresholds.get(format, {}).get(num_images)
        if threshold is None:
            return "no_threshold"
        if ratio is None:
            return "no_ratio"
        kept = ratio <= threshold if format in self.inclusive else ratio < threshold
        return None if kept else "ratio"


def thresholds_of(ratios: Ratios, quantile: float | Literal["youden"]) -> Thresholds:
    """Thresholds from the scores themselves, one a format and number of pictures.

    quantile: the ratio that this share of the answers stays under (1: all of them), right or wrong; or `youden`, the one that parts the right
    answers from the wrong ones best (`data.roc.youden`), where there are some of both. Answers about one picture are left out: its ratio is 1.
    """
    thresholds: Thresholds = {}
    for (name, count), group in sorted(ratios.items()):
        every, right, wrong = group
        if count < 2 or not len(every):
            continue
        if quantile != "youden":
            threshold = float(np.quantile(every, quantile)) if quantile < 1 else float(np.nextafter(every.max(), 2))
        elif len(right) and len(wrong):
            threshold = youden(right, wrong)
        else:
            continue
        thresholds.setdefault(name, {})[count] = threshold
    return thresholds


def match_of(options: Any) -> Match:
    """How a `SelectConfig` has answers compared with the truth."""
    return MATCH[options.preset] if options.match == "preset" else options.match


@dataclass(frozen=True)
class WrongAnswers:
    """Control arm: every record with a usable truth, rejected = a wrong answer drawn at random.

    It is the truth of another record of the same format that is wrong about this one (`is_right`); where the record has options,
    one of these, as a letter where the truth is one. The model's answer, its attention and its perplexity play no part; the length
    of the truth does.
    """

    truths: Mapping[str, Sequence[str]]
    """By format, those of all records in their order."""
    rules: SelectionRules
    seed: int

    def failing(self, record: Mapping[str, Any]) -> list[str]:
        """Name of the rule that a record fails, or none."""
        truth = str(record.get("answer") or "").strip()
        if not truth:
            return ["no_truth"]
        if self.rules.max_truth_chars is not None and len(truth) >= self.rules.max_truth_chars:
            return ["truth_length"]
        return ["no_wrong_answer"] if self._drawn(record) is None else []

    def rejected(self, record: Mapping[str, Any]) -> str:
        """The answer that is drawn for a record that fails nothing."""
        wrong, options = self._drawn(record), record.get("options")
        assert wrong is not None
        return say_option(options.index(wrong), options, str(record["answer"]).strip()) if options else wrong

    def _drawn(self, record: Mapping[str, Any]) -> str | None:
        draw = random.Random(batch_seed(self.seed, "random_wrong", record["id"]))
        return draw_wrong(record, record.get("options") or self.truths[record["format"]], draw, self.rules.match)


def rejected_answer(record: Mapping[str, Any]) -> str:
    """MIA-DPO's selection: the model's own answer is the rejected one."""
    return str(record["response"]).strip()


def preference_pair(record: Mapping[str, Any]) -> Record:
    """A selected record in TRL's conversational columns, with the fields that training and the report use.

    The prompt's content is a list of text and image parts, so that pictures keep their places between the words.
    """
    keys = ("id", "format", "target", "num_images", "box", "region", "patch_grid", "ratio")
    turns, _ = read_prompt(record["prompt"])
    return {
        "prompt": [{**turn.stored(), "content": _parts(turn.text)} for turn in turns],
        **{column: record[column] for column in TEMPLATE_COLUMNS if record.get(column) is not None},
        "chosen": _assistant(str(record["answer"]).strip()),
        "rejected": _assistant(record["rejected"]),
        "images": list(record["images"]),
        **{key: record.get(key) for key in keys},
    }


def draw_wrong(record: Mapping[str, Any], candidates: Sequence[str], draw: random.Random, match: Match) -> str | None:
    """A candidate that is wrong about the record. Drawn by trial first: filtering all candidates of all records is quadratic."""

    def is_wrong(candidate: str) -> bool:
        return is_right(candidate, record["answer"], options=record.get("options"), match=match) is False

    for _ in range(20):
        candidate = draw.choice(candidates)
        if is_wrong(candidate):
            return candidate
    wrong = [candidate for candidate in candidates if is_wrong(candidate)]
    return draw.choice(wrong) if wrong else None


def _parts(prompt: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for index, text in enumerate(prompt.split("<image>")):
        if index:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def _assistant(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
