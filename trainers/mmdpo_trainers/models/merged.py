"""An adapter merged into the whole weights of the model that it belongs to, as a checkpoint of its own."""

from __future__ import annotations

from pathlib import Path

import torch

from mmdpo_trainers.errors import StageError
from mmdpo_trainers.models import quantized
from mmdpo_trainers.models.loading import check_folder, load_model, resolve_model_path


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
    nothing is rounded to 4 bits anew.

    dtype, processor: as of `load_model`. Raises StageError where the folder holds something, or the model is in 4 bits itself.
    """
    base, target = resolve_model_path(path), Path(folder)
    if quantized.method_of(check_folder(base)) is not None:
        raise StageError(
            f"model {base}: an adapter is merged into whole weights, and these are in 4 bits; give the checkpoint that they were made from"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StageError(f"{target} holds something already; give a folder that is new or empty")
    loaded = load_model(base, adapter=adapter, dtype=dtype, device="cpu", processor=processor)
    loaded.model.save_pretrained(target)
    loaded.processor.save_pretrained(target)
    return target
