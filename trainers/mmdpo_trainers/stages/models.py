"""Models of stages: loaded when they are first asked for, and the one that an evaluation is about."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmdpo_kernels import patch_model
from mmdpo_trainers.errors import StageError
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.training.reward.inputs import RewardInputs
from mmdpo_trainers.training.reward.model import RewardModel


class LazyModel:
    """A patched model, loaded when it is first asked for: a continued stage may have nothing left to do with it."""

    def __init__(self, load: Callable[[], LoadedModel]) -> None:
        self._load = load
        self._loaded: LoadedModel | None = None

    def __call__(self) -> LoadedModel:
        if self._loaded is None:
            self._loaded = self._load()
            patch_model(self._loaded.model)
        return self._loaded

    def release(self) -> None:
        """Make room for another model; asked for again, it is loaded again."""
        if self._loaded is None:
            return
        self._loaded = None
        # Modules refer to one another in circles.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_base(context: StageContext) -> LoadedModel:
    """The run's base model."""
    return load_model(context.model, **_choice(context), quantization=context.config.quantization)


def load_evaluated(context: StageContext) -> LoadedModel:
    """The model this evaluation is about: the base, or what training left.

    That is an adapter, merged into a fresh base or beside one in 4 bits, or a model.
    """
    if context.moment != "after":
        return load_base(context)
    trained = what_was_trained(context)
    if (trained / "adapter_config.json").is_file():
        return load_model(context.model, adapter=trained, **_choice(context), quantization=context.config.quantization)
    return load_model(trained, processor=context.model, **_choice(context))


def what_was_trained(context: StageContext) -> Path:
    """The folder that training left. StageError where there is none."""
    if not context.trained.is_dir():
        raise StageError(
            f"{context.trained} does not exist: run train first; or give --moment before, or no --run, to evaluate the model as it is"
        )
    return context.trained


def _choice(context: StageContext) -> dict[str, Any]:
    return {"dtype": context.config.dtype, "device": context.device, "date": context.date}


def load_reward_model(context: StageContext) -> RewardModel:
    """The reward model this evaluation is about: the base with an untrained head and no facts, or what training left."""
    if context.moment != "after":
        return RewardModel.untrained(load_base(context), RewardInputs(), seed=context.seed)
    return RewardModel.load(context.trained, **_choice(context))
