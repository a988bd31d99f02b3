"""What to do with a record whose columns have other names than those that are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_OTHER_NAMES = {
    "prompt": ("question", "instruction", "query", "problem", "input", "text"),
    "completion": ("answer", "answers", "multiple_choice_answer", "output", "response", "solution", "label", "caption"),
    "chosen": ("winner", "preferred", "chosen_response", "better", "accepted", "positive"),
    "rejected": ("loser", "dispreferred", "rejected_response", "worse", "negative"),
}
"""Column that is read -> what other data call it."""


def renaming(record: Mapping[str, Any], wanted: Iterable[str]) -> str:
    """A sentence: the columns that a record has, and which of them to rename so that it has the wanted ones."""
    columns = [str(name) for name in record]
    pairs = [(other, name) for name in wanted if name not in record for other in _OTHER_NAMES[name] if other in record]
    steps = {name: f"{other} to {name}" for other, name in reversed(pairs)}
    found = f"its columns are {', '.join(columns)}"
    if not steps:
        return found
    lists = [f"; of the list in {other} one is the {name}" for other, name in pairs if isinstance(record[other], list)]
    return f"{found}: rename {' and '.join(reversed(steps.values()))}{''.join(lists[:1])}"


def pair_remedy(record: Mapping[str, Any]) -> str:
    """What to do with a preference record of no layout: a sentence as `renaming` gives, and the setting that says it."""
    wanted = ("prompt", "chosen", "rejected")
    found = renaming(record, wanted)
    return (
        found if all(name in record for name in wanted) else f"{found}, or say what they are with `columns` (docs/your_data.md)"
    )


def answers_alone(record: Mapping[str, Any]) -> bool:
    """Whether a record has an answer, and nothing that would be better or worse than another one."""
    names = (*_OTHER_NAMES["chosen"], *_OTHER_NAMES["rejected"])
    return any(name in record for name in ("conversations", "messages", *_OTHER_NAMES["completion"])) and not any(
        name in names or str(name).startswith(("chosen", "rejected")) for name in record
    )
