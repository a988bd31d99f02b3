"""Preference records and trainers on tiny models, for the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import make_tiny_llava, sample_pictures
from transformers import TrainerCallback

from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.training.config import PreferenceConfig
from mmdpo_trainers.training.trainer import PreferenceTrainer

_RESPONSES = [("red circle", "blue"), ("yes", "no it is not"), ("the green square on top", "star"), ("two", "three cat dog")]
_QUESTIONS = ["what colour is the circle ?", "is there a star ?", "which shape is on top ?"]


def preference_records(n: int, pictures: list[Any] | None = None) -> list[dict[str, Any]]:
    """`n` records: sequences of 2-4 pictures, grids and pic-in-pics with a region, single pictures, one without a picture."""
    pictures = pictures or sample_pictures(6)
    records = []
    for index in range(n):
        count = (2, 1, 3, 1, 4, 0)[index % 6]
        form = {0: "text", 1: "grid" if index % 12 == 1 else "single"}.get(count, "sequence")
        chosen, rejected = _RESPONSES[index % 4]
        places = "".join(f"Image {place + 1} : <image>\n" for place in range(count)) if count > 1 else "<image>\n" * count
        record: dict[str, Any] = {
            "id": f"record-{index}",
            "format": form,
            "images": [pictures[(index + place) % len(pictures)] for place in range(count)],
            "prompt": [{"role": "user", "content": places + _QUESTIONS[index % 3]}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "target": index % count if count else None,
            "region": [0, 0, 2, 3] if form == "grid" else None,
            "patch_grid": [4, 4] if form == "grid" else None,
        }
        records.append(record)
    return records


def tiny(folder: Path, dtype: torch.dtype = torch.float64, **options: Any) -> LoadedModel:
    """A tiny LLaVA, made in `folder` on first use."""
    if not (folder / "config.json").exists():
        make_tiny_llava(folder, **options)
    return load_model(folder, dtype=dtype, device="cpu")


def config(output: Path, *, kind: type[PreferenceConfig] = PreferenceConfig, **options: Any) -> Any:
    """Settings of a short run on the CPU."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "lora_r": 4,
        "lora_alpha": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
    }
    return kind(output_dir=str(output), **{**defaults, **options})


class Gradients(TrainerCallback):
    """Keeps the gradients of each optimizer step, by parameter name."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def warm_adapter(trainer: PreferenceTrainer, seed: int = 5) -> None:
    """Move the adapter off its starting point, where half of its gradients are zero and policy and reference agree."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
