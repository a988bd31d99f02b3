"""What a judge's reply says: JSON is looked for leniently, and what it holds is checked strictly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

Choice = Literal["A", "B", "tie"]
"""Which of two answers is the better one, by its place in the prompt."""

BETTER = "better"
"""Key of a comparison's reply."""


class ReplyError(ValueError):
    """A reply that holds no rating; its message is what the judge is told when it is asked again."""


def parse_ratings(reply: str, attributes: Sequence[str], lowest: float, highest: float) -> dict[str, float]:
    """Attribute -> number, from the last JSON object of the reply that has one of the attributes.

    Text around it, code fences, other keys, capitals in keys, numbers as texts and `{"score": 3, "reason": …}` in place of a number
    are taken. ReplyError where an attribute is missing, is no finite number, or is out of range.
    """
    wanted = {name.casefold(): name for name in attributes}
    objects = [{str(key).strip().casefold(): value for key, value in each.items()} for each in json_objects(reply)]
    found = next((each for each in reversed(objects) if wanted.keys() & each.keys()), None)
    if found is None:
        raise ReplyError(f"expected a JSON object with the keys {', '.join(attributes)}, got none")
    return {name: _number(found, key, name, lowest, highest) for key, name in wanted.items()}


def parse_choice(reply: str) -> Choice:
    """The better one of two answers: a JSON object with the key `better`, or nothing but A, B or tie. ReplyError for anything else."""
    objects = [each for each in json_objects(reply) if BETTER in each]
    said = objects[-1][BETTER] if objects else reply
    word = str(said).strip().strip(".\"'`").removeprefix("Answer ").casefold()
    choices: dict[str, Choice] = {"a": "A", "b": "B", "tie": "tie"}
    if word not in choices:
        raise ReplyError(f'expected a JSON object whose key "{BETTER}" is "A", "B" or "tie", got {str(said)[:80]!r}')
    return choices[word]


def ratings_schema(attributes: Sequence[str], lowest: float, highest: float) -> dict[str, Any]:
    """JSON schema of a reply that `parse_ratings` takes."""
    number = {"type": "number", "minimum": lowest, "maximum": highest}
    return _schema({name: number for name in attributes})


def choice_schema() -> dict[str, Any]:
    """JSON schema of a reply that `parse_choice` takes."""
    return _schema({BETTER: {"type": "string", "enum": ["A", "B", "tie"]}})


def _schema(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def json_objects(text: str) -> Iterator[dict[str, Any]]:
    """JSON objects in a text, from left to right, none inside another."""
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            if isinstance(value, dict):
                yield value
        start = text.find("{", end)


def _number(found: dict[str, Any], key: str, name: str, lowest: float, highest: float) -> float:
    expected = f"{name}: expected a number from {lowest:g} to {highest:g}"
    if key not in found:
        raise ReplyError(f"{expected}, got none")
    value = found[key]
    if isinstance(value, dict):
        value = next((value[inner] for inner in ("score", "rating", "value") if inner in value), value)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or not lowest <= number <= highest:
        raise ReplyError(f"{expected}, got {str(value)[:40]!r}")
    return number
