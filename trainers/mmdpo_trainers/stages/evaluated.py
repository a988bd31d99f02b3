"""The model that an evaluation is about."""

from __future__ import annotations

from typing import Any

from mmdpo_trainers.errors import StageError
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.stages.context import StageContext


def load_evaluated(context: StageContext) -> LoadedModel:
    """The model this evaluation is about: the base, or what training left (an adapter, merged into a fresh base, or a model)."""
    config = context.config
    choice: dict[str, Any] = {"dtype": config.dtype, "device": context.device, "date": context.date}
    if context.moment != "after":
        return load_model(context.model, **choice)
    trained = context.trained
    if (trained / "adapter_config.json").is_file():
        return load_model(context.model, adapter=trained, **choice)
    if not trained.is_dir():
        raise StageError(f"{trained} does not exist: run train first")
    return load_model(trained, processor=context.model, **choice)
