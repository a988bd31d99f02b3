"""An adapter merged into the whole weights of the model that it belongs to, as a checkpoint of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mmdpo_trainers.errors import StageError
from mmdpo_trainers.models import quantized
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import check_folder, load_model, resolve_model_path
from mmdpo_trainers.models.published import copy_files, write_weights

REWARD = "reward_model.json"
"""File beside the adapter of a reward model, which has a head that no model of transformers has."""


def check_mergeable(base: Path, adapter: Path) -> None:
    """StageError, before anything is read, where an adapter cannot become part of a base's weights."""
    if quantized.method_of(check_folder(base)) is not None:
        raise StageError(
            f"model {base}: an adapter is merged into whole weights, and these are in 4 bits; give the checkpoint that they were made from"
        )
    if not (adapter / "adapter_config.json").is_file():
        raise StageError(f"adapter {adapter}: no adapter_config.json there; give the folder that PEFT's save_pretrained wrote")
    if (adapter / REWARD).is_file():
        raise StageError(
            f"adapter {adapter}: it is a reward model's, whose head rates answers and is part of no model of transformers; read it with "
            "mmdpo_trainers.training.reward, or rate answers with rate.source: model"
        )


def adapted(loaded: LoadedModel, adapter: Path) -> Any:
    """The PEFT model of a loaded one with an adapter beside its weights: `loaded.model` computes with it from then on."""
    from peft import PeftModel

    try:
        found = PeftModel.from_pretrained(loaded.model, str(adapter), is_trainable=False, local_files_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise StageError(f"adapter {adapter} does not fit the model ({error}); it was trained on another base") from error
    if not hasattr(found.base_model, "merge_and_unload"):
        kind = found.peft_config[found.active_adapter].peft_type
        raise StageError(
            f"adapter {adapter}: expected one that can be merged, such as LoRA's, got {getattr(kind, 'value', kind)}; export the adapter alone"
        )
    return found


def merge(loaded: LoadedModel, model: Any) -> LoadedModel:
    """The loaded model with what `adapted` put beside its weights merged into them, layer by layer and in place."""
    return dataclasses.replace(loaded, model=model.merge_and_unload())


def save_merged(
    path: str | Path,
    adapter: str | Path,
    folder: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    processor: str | Path | None = None,
) -> Path:
    """Write the model of a folder with an adapter merged into its weights, and its processor, to a new folder, which is returned.

    Each adapted weight is W + scaling B A, in W's dtype, by PEFT's `merge_and_unload`. Of an adapter that was trained on the model in 4
    bits, W is the whole weight and not the rounded one, so log-probabilities differ from those of the training by what 4 bits round away;
    nothing is rounded to 4 bits anew. Names and files are those that the base was published with (`published`).

    dtype, processor: as of `load_model`. Raises StageError where the folder holds something, or the model is in 4 bits itself.
    """
    base, target = resolve_model_path(path), Path(folder)
    check_mergeable(base, Path(adapter))
    check_empty(target)
    loaded = load_model(base, dtype=dtype, device="cpu", processor=processor)
    merged = merge(loaded, adapted(loaded, Path(adapter)))
    write_weights(merged.model, target)
    copy_files(base, target, merged.dtype)
    if processor is not None:
        copy_files(resolve_model_path(processor), target)
    return target


def save_whole(path: str | Path, base: str | Path, folder: str | Path, *, dtype: str | torch.dtype = "auto") -> Path:
    """Write a whole model that was trained, with the processor and the files of its base, as `save_merged` does one with an adapter."""
    source, target = resolve_model_path(base), Path(folder)
    check_empty(target)
    loaded = load_model(path, dtype=dtype, device="cpu", processor=source)
    write_weights(loaded.model, target)
    copy_files(source, target, loaded.dtype)
    return target


def check_empty(target: Path) -> None:
    """StageError where a folder that is to be written holds something."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StageError(f"{target} holds something already; give a folder that is new or empty")
