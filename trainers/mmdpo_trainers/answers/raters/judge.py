"""A judge: a model that is asked in words, and whose replies are read. Where it runs is an `Asker`'s business."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from mmdpo_trainers.answers.raters.parsing import (
    Choice,
    ReplyError,
    choice_schema,
    parse_choice,
    parse_ratings,
    ratings_schema,
)
from mmdpo_trainers.answers.raters.prompts import JudgePrompts, again
from mmdpo_trainers.answers.raters.rating import Rating
from mmdpo_trainers.answers.raters.replies import KeptReplies, Reply
from mmdpo_trainers.config.sections.rating import AskedConfig, RateConfig
from mmdpo_trainers.data.pair_records import record_image_digest

T = TypeVar("T")
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Form:
    """What a question asks for. name: in its hash, so two forms of one text are two questions; schema: of the JSON that replies hold."""

    name: str
    schema: Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """One text to a judge, with the pictures that its `<image>` stand for."""

    key: str
    """Hash of the judge and of all that it is told: the same question has the same reply."""
    id: str
    """Record that it is about."""
    text: str
    images: tuple[Any, ...]
    form: Form


Keep = Callable[[str, str, Reply], None]
"""(key of the question, id of the record, reply): called once a question, as replies come, from any thread."""


class Asker(Protocol):
    """Where a judge runs."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What of it and of its settings a reply depends on."""
        ...

    def ask(self, questions: Sequence[Question], keep: Keep) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Problem:
    """Why there is no judgement: in words, and as a word to count by."""

    detail: str
    reason: str


class AskedModel:
    """A model that is asked in words, through an `Asker`; a reply that cannot be read is asked for again, up to `tries` times in all."""

    def __init__(self, options: AskedConfig, asker: Asker, kept: KeptReplies) -> None:
        self._options, self._asker, self._kept = options, asker, kept
        self._identity = {**asker.identity, "max_new_tokens": options.max_new_tokens}

    @property
    def identity(self) -> Mapping[str, Any]:
        """The model, and those of its settings that a reply depends on."""
        return self._identity

    def close(self) -> None:
        self._asker.close()
        self._kept.close()

    def replies(
        self, records: Sequence[Record], prompts: Sequence[str], form: Form, parse: Callable[[str], T]
    ) -> list[T | Problem]:
        """What `parse` reads off the reply to each prompt, or why there is nothing to be read.

        records: what each prompt is about: `id`, and `images` for its places of pictures. parse raises ReplyError, whose message the model
        is told when it is asked again.
        """
        self._kept.refresh()
        found: dict[int, T | Problem] = {}
        texts, pending = list(prompts), list(range(len(prompts)))
        for attempt in range(1, self._options.tries + 1):
            questions = {place: self._question(records[place], texts[place], form, attempt) for place in pending}
            # Equal answers to a record are one question.
            missing = {each.key: each for each in questions.values() if self._kept.find(each.key) is None}
            self._asker.ask(list(missing.values()), self._kept.add)
            pending = []
            for place, question in questions.items():
                reply = self._kept.find(question.key)
                assert reply is not None
                if reply.text is None:
                    found[place] = Problem(str(reply.problem), str(reply.reason))
                    continue
                try:
                    found[place] = parse(reply.text)
                except ReplyError as error:
                    complaint = f"it was cut at {self._options.max_new_tokens} tokens" if reply.cut else str(error)
                    found[place] = Problem(f"asked {attempt} times; {complaint}; last reply: {reply.text[:200]!r}", "malformed")
                    texts[place] = again(prompts[place], reply.text, complaint)
                    pending.append(place)
            if not pending:
                break
        return [found[place] for place in range(len(prompts))]

    def _question(self, record: Record, text: str, form: Form, attempt: int) -> Question:
        images = tuple(record.get("images") or ())
        seen = [record_image_digest(record, image) for image in images]
        told = json.dumps([self._identity, form.name, text, seen, attempt], sort_keys=True)
        return Question(hashlib.sha256(told.encode()).hexdigest(), str(record["id"]), text, images, form)


class Judge:
    """Rates answers, and compares two, by asking a model."""

    def __init__(self, options: RateConfig, model: AskedModel) -> None:
        self._options, self._model, self._prompts = options, model, JudgePrompts(options)

    @property
    def attributes(self) -> tuple[str, ...]:
        return tuple(self._options.attributes)

    def rate(self, records: Sequence[Record], responses: Sequence[Sequence[str]]) -> list[list[Rating]]:
        options = self._options
        asked = [(record, text) for record, texts in zip(self._shown(records), responses, strict=True) for text in texts]

        def parse(reply: str) -> dict[str, float]:
            return parse_ratings(reply, options.attributes, options.lowest, options.highest)

        prompts = [self._prompts.rating(record, text) for record, text in asked]
        form = Form("ratings", ratings_schema(options.attributes, options.lowest, options.highest))
        found = iter(self._model.replies([record for record, _ in asked], prompts, form, parse))
        return [[_rating(next(found)) for _ in texts] for texts in responses]

    def compare(self, records: Sequence[Record], pairs: Sequence[tuple[str, str]]) -> list[Choice | None]:
        """Which answer of each pair is the better one; None where the judge gave no reply that can be read."""
        prompts = [self._prompts.comparison(record, *pair) for record, pair in zip(records, pairs, strict=True)]
        found = self._model.replies(self._shown(records), prompts, CHOICE, parse_choice)
        return [None if isinstance(each, Problem) else each for each in found]

    def close(self) -> None:
        self._model.close()

    def _shown(self, records: Sequence[Record]) -> Sequence[Record]:
        return records if self._options.images else [{**record, "images": []} for record in records]


CHOICE = Form("choice", choice_schema())
"""Which of two answers is the better one: `parse_choice`."""


def _rating(found: dict[str, float] | Problem) -> Rating:
    return Rating(None, found.detail, found.reason) if isinstance(found, Problem) else Rating(found)
