"""How a setting is declared: its default, its help text, its limits, and whether it is a path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    factory: Any = dataclasses.MISSING,
    result: bool | Callable[[Any], Any] = True,
    path: bool = False,
    when: str = "",
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """A dataclass field with its help text. result=False: it cannot change what a stage writes, so fingerprints leave it out;
    a function gives what of its value can. path: a path, or a list or a mapping to them, which is saved absolute. when: when to change it, which
    `mmdpo init` writes beside it. ge to lt are pydantic's limits of a number."""
    metadata = {"description": help, "result": result, "path": path, "when": when, "ge": ge, "gt": gt, "le": le, "lt": lt}
    if factory is not dataclasses.MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


Count = Annotated[StrictInt, Field(ge=0)]
"""A number of things, in a mapping, which an option's own limits do not reach into."""

ColumnName = Literal["id", "question", "answer", "chosen", "rejected", "images", "rejected_images", "options"]
"""What a file's columns may be said to be."""

COLUMNS_WORDS = "what the data's columns are, as {question: q, chosen: better}; None: they tell their layout (docs/your_data.md)"
"""The same for all settings `columns`, for help texts."""

Match = Literal["exact", "contains", "choice"]
"""How an answer is compared with the truth, see `data.match.is_right`."""

MATCH_WORDS = (
    "exact: the same text but for case, punctuation and article, or the same option; choice: also the only option named in a sentence; "
    "contains: choice where there are options, else the truth's words in a sentence, unless negated"
)
"""What `Match` means, for help texts."""
