"""A model folder without its weights: what prompts and answers ask of it, and the number type its weights are in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, GenerationConfig

from mmdpo_trainers.data.conversation import conversation_of
from mmdpo_trainers.errors import StageError
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.processors import load_processor
from mmdpo_trainers.models.template_date import TemplateDate

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Number types of a safetensors file in which a model can be loaded."""


class _ConfigOnly(torch.nn.Module):
    """What is asked of a model besides its weights."""

    def __init__(self, config: Any, generation_config: Any) -> None:
        super().__init__()
        self.config, self.generation_config = config, generation_config
        self.place = torch.nn.Parameter(torch.empty(0))


def config_only(folder: Path, date: TemplateDate | None = None) -> LoadedModel:
    """The model of a folder, of which everything can be asked that needs no weight. date: as in `load_model`."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    own = (folder / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(folder) if own else GenerationConfig.from_model_config(config)
    return LoadedModel(
        model=_ConfigOnly(config, generation),
        processor=load_processor(folder, config.model_type),
        path=folder,
        date=date or TemplateDate.now(),
    )


def check_prompts(folder: Path, records: Iterable[Mapping[str, Any]], date: TemplateDate | None = None) -> None:
    """Raise DataError, naming the record, for a prompt that does not go into the model's chat format: before the first is answered."""
    texts = config_only(folder, date).texts
    for record in records:
        texts.check_conversation(record["id"], conversation_of(record))


def own_dtype(folder: Path, config: Any) -> str:
    """The number type that transformers loads a checkpoint in by itself: its configuration's, or that of its first floating weight.

    Raises StageError where neither names one.
    """
    if config.dtype is not None:
        return str(config.dtype).removeprefix("torch.")
    try:
        with safe_open(_first_file(folder), framework="pt") as weights:
            kinds = (weights.get_slice(name).get_dtype() for name in weights.keys())  # noqa: SIM118
            found = next((_DTYPES[kind] for kind in kinds if kind in _DTYPES), None)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise StageError(f"{_no_dtype(folder)} ({error}); set dtype to the one that the weights are in") from error
    if found is None:
        raise StageError(f"{_no_dtype(folder)}; set dtype to the one to load them in")
    return found


def _no_dtype(folder: Path) -> str:
    return f"model {folder}: expected a number type in config.json, or safetensors weights in {', '.join(_DTYPES.values())}; got neither"


def _first_file(folder: Path) -> Path:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return folder / "model.safetensors"
    return folder / str(min(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
