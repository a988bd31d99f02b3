"""How a judge marks an answer to a benchmark: what it is asked, what is read off its reply, what that is worth.

Prompts are in words of this project's own, with the scale and the criteria that were published; `evaluate.judge.templates` puts others in
their place. No picture is sent: the published judges of these benchmarks see none either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from mmdpo_trainers.answers.raters.judge import Form
from mmdpo_trainers.answers.raters.parsing import ReplyError, json_objects, parse_ratings, ratings_schema
from mmdpo_trainers.answers.raters.prompts import plain, read_template
from mmdpo_trainers.data.conversation import words
from mmdpo_trainers.data.records import IMAGE_TOKEN
from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.suites.suite import Judging, Record

SAMPLE = "It is a red ball."
"""The answer in `Judging.sample`."""


class Prompts:
    """Texts of a benchmark's questions to a judge.

    own: a jinja2 file in place of the built-in template. Raises ConfigError for a template that cannot be read, or not be filled.
    """

    def __init__(self, judging: Judging, where: str, own: str | None = None) -> None:
        self._judging, self._where = judging, where
        self._template = read_template(where, own, judging.template, f"{__package__}.asked")

    def check(self) -> None:
        """Raise ConfigError for a template that cannot be filled, or that leaves the answer out."""
        text = self._filled(self._judging.sample)
        if SAMPLE not in text:
            raise ConfigError(
                f"{self._where}: {self._template.filename} does not show the answer; it has the values {', '.join(self._judging.sample)}"
            )

    def texts(self, record: Record, answer: Record) -> list[str]:
        """What the judge is asked about an answer."""
        return [self._filled(values) for values in self._judging.asked(record, answer)]

    def _filled(self, values: Mapping[str, Any]) -> str:
        try:
            return self._template.render({name: _without_places(value) for name, value in values.items()})
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise ConfigError(
                f"{self._where}: {self._template.filename} cannot be filled ({error}); it has the values {', '.join(values)}"
            ) from error


def _without_places(value: Any) -> Any:
    """A value without the places of pictures, which a judge that sees none would be asked about."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, Mapping):
        return {name: _without_places(each) for name, each in value.items()}
    return [_without_places(each) for each in value] if isinstance(value, list | tuple) else value


def question_of(record: Record) -> str:
    """What was asked, without the places of pictures."""
    return words(record["prompt"]).replace(f"{IMAGE_TOKEN}\n", "").replace(IMAGE_TOKEN, "").strip()


def rating_form(name: str, keys: Sequence[str], lowest: float, highest: float) -> Form:
    """Asks for a number for each key."""
    return Form(name, ratings_schema(keys, lowest, highest))


def rating(reply: str, key: str, lowest: float, highest: float, *, whole: bool = False) -> float:
    """The number under a key. ReplyError where there is none in range, or where it has to be a whole one and is not."""
    value = parse_ratings(reply, (key,), lowest, highest)[key]
    if whole and value != int(value):
        raise ReplyError(f"{key}: expected a whole number from {lowest:g} to {highest:g}, got {value:g}")
    return value


OBJECTS = Form(
    "objects",
    {
        "type": "object",
        "properties": {"objects": {"type": "array", "items": {"type": "string"}}},
        "required": ["objects"],
        "additionalProperties": False,
    },
)
"""Asks for a list of names of objects."""


def listed_objects(reply: str) -> list[str]:
    """The list under `objects` of the last JSON object that has one. ReplyError for anything else."""
    lists = [each["objects"] for each in json_objects(reply) if "objects" in each]
    if not lists or not isinstance(lists[-1], list) or not all(isinstance(name, str) for name in lists[-1]):
        got = "none" if not lists else repr(str(lists[-1])[:80])
        raise ReplyError(f'expected a JSON object whose key "objects" is a list of texts, got {got}')
    return lists[-1]
