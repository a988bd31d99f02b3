"""Preference training on `transformers.Trainer`: configuration, token-tree batches, trainers, reward models, checkpoints.

Imported by stages, run and checks, and by users who write their own script; imports answers, models, methods and data.
"""

from mmdpo_trainers.training.config import PreferenceConfig
from mmdpo_trainers.training.reward.config import RewardConfig
from mmdpo_trainers.training.reward.trainer import RewardTrainer
from mmdpo_trainers.training.trainer import PreferenceTrainer

__all__ = ["PreferenceConfig", "PreferenceTrainer", "RewardConfig", "RewardTrainer"]
