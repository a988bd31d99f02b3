"""`RewardConfig`: what a reward model is trained with; TRL's names where TRL has the same thing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmdpo_trainers.data.conversation import Conversation
from mmdpo_trainers.data.pair_records import PAIR, Branch
from mmdpo_trainers.training.arguments import takes_foreign_names
from mmdpo_trainers.training.config import PreferenceConfig
from mmdpo_trainers.training.reward.inputs import FACTS, RewardInputs

_PREFERENCE_ONLY = (
    *("loss_type", "loss_weights", "beta", "label_smoothing", "length_normalised", "changed_token_weight", "simpo_gamma"),
    *("anchor", "anchors", "further_branches", "corruption", "corruption_keep", "corruption_strength", "corruption_seed"),
    *("corruption_draw", "extra_negative", "extra_negative_weight", "bco_shift", "similar_beta"),
    *("attention_target", "attention_target_weight", "attention_target_layer"),
)
"""Fields that are about log-probabilities of responses."""


@takes_foreign_names
@dataclass
class RewardConfig(PreferenceConfig):
    """`PreferenceConfig` without what is about log-probabilities, which is refused, and with the fields of TRL's `RewardConfig`.

    Raises ValueError naming the field where values do not fit together.
    """

    center_rewards_coefficient: float | None = field(
        default=None,
        metadata={
            "help": "factor of (chosen + rejected reward)^2, which holds rewards near 0; TRL recommends 0.01. None: without"
        },
    )
    facts: list[str] = field(
        default_factory=list,
        metadata={"help": f"what the reward model is told in the prompt, of a record's columns: {', '.join(FACTS)}"},
    )
    facts_template: str | None = field(
        default=None,
        metadata={"help": f"jinja2 template of the prompt with facts, of prompt, {', '.join(FACTS)}; None: a line a fact"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {each.name: each for each in dataclasses.fields(PreferenceConfig)}
        for name in _PREFERENCE_ONLY:
            each, value = defaults[name], getattr(self, name)
            plain = each.default_factory() if each.default_factory is not dataclasses.MISSING else each.default
            if value != plain:
                raise ValueError(f"{name}: a reward model compares rewards, not log-probabilities, got {value!r}; leave it out")
        if self.full_finetune:
            raise ValueError("full_finetune: a reward model is trained as an adapter with its head; leave it out")
        if self.router_aux_loss_coef:
            raise ValueError(
                f"router_aux_loss_coef: a reward model has no load-balancing loss, as in TRL, got {self.router_aux_loss_coef}; leave it out"
            )
        self.router_aux_loss_coef = 0.0
        coefficient = self.center_rewards_coefficient
        if coefficient is not None and not (isinstance(coefficient, int | float) and 0 <= coefficient < float("inf")):
            raise ValueError(f"center_rewards_coefficient: expected a number of 0 or more, or None, got {coefficient!r}")
        self.inputs  # noqa: B018 - raises ValueError where its parts do not fit

    @property
    def inputs(self) -> RewardInputs:
        """What the model is trained to read."""
        return RewardInputs.of(vars(self))

    @property
    def needs_reference(self) -> bool:
        """False: rewards are compared with each other."""
        return False

    @property
    def branches(self) -> dict[str, Branch]:
        """The two responses."""
        return dict(PAIR)

    @property
    def prompt_of(self) -> Callable[[Mapping[str, Any]], Conversation]:
        """What writes the facts into a record's prompt."""
        return self.inputs.prompt_of
