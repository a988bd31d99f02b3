"""Preference training on `transformers.Trainer`: configuration, token-tree batches, the trainer, checkpoints.

Imported by the train stage and by users who write their own script.
"""

from mmdpo_trainers.training.config import PreferenceConfig
from mmdpo_trainers.training.trainer import PreferenceTrainer

__all__ = ["PreferenceConfig", "PreferenceTrainer"]
