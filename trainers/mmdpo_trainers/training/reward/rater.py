"""A reward model as a rater of answers, and the raters of `rate.source` with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmdpo_trainers.answers import raters
from mmdpo_trainers.answers.raters import Rater, Rating, Surroundings
from mmdpo_trainers.config.sections.rating import RateConfig
from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.training.reward.inputs import RewardInputs
from mmdpo_trainers.training.reward.model import EMPTY, RewardModel

SOURCE = "reward_model"
"""Value of `rate.source`."""
ATTRIBUTE = "reward"


class RewardRater:
    """Ratings by a reward model: one attribute, without bounds; only differences between answers to one prompt mean anything."""

    def __init__(self, model: RewardModel) -> None:
        self.model = model

    @property
    def attributes(self) -> tuple[str, ...]:
        return (ATTRIBUTE,)

    def rate(self, records: Sequence[Mapping[str, Any]], responses: Sequence[Sequence[str]]) -> list[list[Rating]]:
        """See `Rater`; the answers to all of the records go through the model together, in one token tree."""
        problems = [
            [self.model.problem(record, text) for text in texts] for record, texts in zip(records, responses, strict=True)
        ]
        kept = [
            [text for text, problem in zip(texts, found, strict=True) if problem is None]
            for texts, found in zip(responses, problems, strict=True)
        ]
        rated = [number for number, texts in enumerate(kept) if texts]
        rewards = self.model.rewards([records[number] for number in rated], [kept[number] for number in rated])
        by_record = {number: iter(found) for number, found in zip(rated, rewards, strict=True)}
        return [
            [
                Rating({ATTRIBUTE: next(by_record[number])}) if problem is None else Rating(None, problem, _reason(problem))
                for problem in found
            ]
            for number, found in enumerate(problems)
        ]

    def close(self) -> None:
        pass


def _reason(problem: str) -> str:
    return "empty" if problem == EMPTY else "unfit"


def rater_of(options: RateConfig, surroundings: Surroundings) -> Rater:
    """The rater that `rate.source` names, reward models among them. Raises MmdpoError where its settings or files will not do."""
    if options.source != SOURCE:
        return raters.rater_of(options, surroundings)
    check_rater(options)
    model = RewardModel.load(str(options.judge), dtype=surroundings.dtype, device=surroundings.device, date=surroundings.date)
    return RewardRater(model)


def check_rater(options: RateConfig) -> None:
    """Raise ConfigError for settings of `rate` that cannot be; of a reward model, for others than it was trained to read."""
    raters.check_rater(options)
    if options.source != SOURCE:
        return
    inputs, model = RewardInputs.read(str(options.judge)), options.judge
    if set(options.facts) != set(inputs.facts):
        raise ConfigError(
            f"rate.facts: expected [{', '.join(inputs.facts)}], which the reward model {model} was trained to read, got "
            f"[{', '.join(options.facts)}]; set rate.facts so"
        )
    if options.images == inputs.no_image:
        seen = "without pictures (no_image)" if inputs.no_image else "with pictures"
        raise ConfigError(f"rate.images: the reward model {model} was trained {seen}, got {options.images}; set it so")
