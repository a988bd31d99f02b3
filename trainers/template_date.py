"""`TemplateDate`: the date that a run's prompts are of, where the model's chat template prints one."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from mmdpo_trainers.errors import ConfigError


@dataclass(frozen=True)
class TemplateDate:
    """What a chat template that prints today's date is told: one moment for all of a run, or its prompts would change overnight."""

    moment: datetime.datetime

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

    def __str__(self) -> str:
        return self.moment.isoformat()
