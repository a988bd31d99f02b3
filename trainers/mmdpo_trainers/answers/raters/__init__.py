"""Who rates answers: the truth, a file, a judge behind an endpoint, a local model. All are a `Rater`.

Imported by training and stages; imports the engines beside it and what is below.
"""

from __future__ import annotations

from mmdpo_trainers.answers.raters.exact import ExactRater
from mmdpo_trainers.answers.raters.rating import Rater, Rating, Surroundings
from mmdpo_trainers.config.sections.rating import RateConfig
from mmdpo_trainers.errors import ConfigError

__all__ = ["Rater", "Rating", "Surroundings", "rater_of"]


def rater_of(options: RateConfig, surroundings: Surroundings) -> Rater:
    """The rater that `rate.source` names. Raises ConfigError where its settings are incomplete."""
    if options.source == "exact":
        return ExactRater(options)
    raise ConfigError(f"rate.source: {options.source} is not available in this version; choose exact")
