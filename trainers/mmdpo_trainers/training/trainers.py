"""The trainers, by the names that methods declare."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mmdpo_trainers.training.reward.trainer import RewardTrainer
from mmdpo_trainers.training.trainer import PreferenceTrainer

TRAINERS: Mapping[str, type[PreferenceTrainer]] = MappingProxyType(
    {"preference": PreferenceTrainer, "reward_model": RewardTrainer}
)
"""Name -> trainer, whose `config_class` its settings are of."""
