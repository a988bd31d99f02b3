"""`TemplateDate`: the date that a run's prompts are of, where the model's chat template prints one, and its arguments in all of the run."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmdpo_trainers.data.content import UnreadContent
from mmdpo_trainers.data.conversation import check_arguments
from mmdpo_trainers.errors import ConfigError

ASKED = "strftime_now"
"""The function by which chat templates ask for the date."""

_DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"
_PERCENT = "\ue000"


@dataclass(frozen=True)
class TemplateDate:
    """What a chat template is told in all of a run: where it prints today's date one moment, or the run's prompts would change overnight.

    arguments: of the template, as JSON; those of a record (`chat_template_kwargs`) win.
    """

    moment: datetime.datetime
    arguments: str = ""

    @classmethod
    def now(cls) -> TemplateDate:
        return cls(datetime.datetime.now().replace(microsecond=0))

    @classmethod
    def read(cls, text: str) -> TemplateDate:
        """From `str(date)`. ConfigError where the text is no date."""
        try:
            return cls(datetime.datetime.fromisoformat(text))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"template_date: expected a date such as 2025-03-01 or 2025-03-01T12:00:00, got {text!r}"
            ) from error

    def with_arguments(self, arguments: Mapping[str, Any] | None) -> TemplateDate:
        """The same with arguments for the template. ConfigError for one that is not a template's own."""
        try:
            check_arguments(arguments or {}, "chat_template_kwargs")
        except UnreadContent as error:
            raise ConfigError(str(error)) from error
        return dataclasses.replace(self, arguments=json.dumps(dict(arguments), sort_keys=True) if arguments else "")

    def __str__(self) -> str:
        """The moment, which `read` reads."""
        return self.moment.isoformat()

    def told(self, template: str) -> str:
        """A chat template that prints this date where it asks for today's."""
        # The line break is the block's own: what the template begins with stays.
        return f"{_macro(self)}\n{template}" if ASKED in template else template


@functools.lru_cache(maxsize=16)
def _macro(date: TemplateDate) -> str:
    """A Jinja macro in place of transformers' function: a function that is passed to a template arrives as text from 5.24 on."""
    codes = [f"%{flag}{letter}" for flag in ("-", "") for letter in _DIRECTIVES]
    values = {"%%": _PERCENT, **{code: date.moment.strftime(code) for code in codes}, _PERCENT: "%"}
    replaced = "".join(f".replace({json.dumps(code)}, {json.dumps(value)})" for code, value in values.items())
    return f"{{% macro {ASKED}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}"
