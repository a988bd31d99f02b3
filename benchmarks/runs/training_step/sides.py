"""The trainers that are compared. Each has a model, an adapter and records of its own that equal the others'."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import Trainer

from benchmarks.runs.training_step.setting import Setting, build, processor_of, records
from mmdpo_trainers.models.families import family_of
from mmdpo_trainers.processes.progress import Progress
from mmdpo_trainers.training import model_parts
from mmdpo_trainers.training.config import PreferenceConfig
from mmdpo_trainers.training.reference.cache import ReferenceCache
from mmdpo_trainers.training.reference.precompute import precompute
from mmdpo_trainers.training.trainer import PreferenceTrainer

MDPO = ["sigmoid", "copo", "ancpo"]
EPOCHS = 3
"""The cost of caching the reference is spread over so many epochs."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to train."""

    kind: str
    """`ours`, `trl`, `official` (mDPO's authors), or `official rows` (logits of response rows only)."""
    batch: int = 1
    checkpointing: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `PreferenceConfig` that differ from its defaults; `own_vision`: see `see_apart`."""

    @property
    def caches(self) -> bool:
        return bool(self.options.get("precompute_ref_log_probs"))


def ours(*, batch: int = 1, checkpointing: bool = False, **options: Any) -> Side:
    """`PreferenceTrainer` with the reference cached."""
    return Side(kind="ours", batch=batch, checkpointing=checkpointing, options={"precompute_ref_log_probs": True, **options})


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is trained, on what, and where."""

    model: Callable[[], Any]
    """Makes the model, for each trainer anew; all are equal."""
    processor: Any
    data: Any
    """As of `setting.records`."""
    lora_r: int
    arguments: Mapping[str, Any] = field(default_factory=lambda: {"use_cpu": True, "bf16": False})
    """Fields of `TrainingArguments` that say where."""


def cached_records(side: Side, setting: Setting) -> int:
    """Records in a timed reference pass: enough for every picture to be used as often as in training."""
    return min(max(side.batch, setting.questions), setting.records)


def make(side: Side, setting: Setting) -> Trainer:
    """The side's trainer on the setting's model and records."""
    subject = Subject(model=lambda: build(setting), processor=processor_of(setting), data=records(setting), lora_r=setting.lora_r)
    return trainer_of(side, subject)


def trainer_of(side: Side, subject: Subject) -> Trainer:
    """The side's trainer on a model and records of its own."""
    arguments = {
        "output_dir": _folder(),
        "per_device_train_batch_size": side.batch,
        "per_device_eval_batch_size": side.batch,
        "gradient_checkpointing": side.checkpointing,
        "learning_rate": 1e-5,
        "max_steps": 1_000_000,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **subject.arguments,
    }
    options = dict(side.options)
    own_vision = options.pop("own_vision", False)
    config = PreferenceConfig(**arguments, lora_r=subject.lora_r, lora_alpha=2 * subject.lora_r, **options)
    model, processor, data = subject.model(), subject.processor, subject.data
    if side.kind == "ours":
        trainer = PreferenceTrainer(model, config, processing_class=processor, train_dataset=data, progress=_quiet())
        return see_apart(trainer) if own_vision else trainer
    adapter = model_parts.lora_config(model, config)
    if side.kind == "trl":
        return _trl(model, arguments, processing_class=processor, train_dataset=data, peft_config=adapter)
    from peft import get_peft_model
    from transformers import TrainingArguments

    from benchmarks.runs.training_step.official_mdpo import OfficialCollator, OfficialTrainer

    return OfficialTrainer(
        get_peft_model(model, adapter),
        TrainingArguments(**arguments, remove_unused_columns=False, label_names=[]),
        data_collator=OfficialCollator(processor),
        train_dataset=data,
        rows_only=side.kind == "official rows",
    )


def _trl(model: nn.Module, arguments: dict[str, Any], **options: Any) -> Trainer:
    """`DPOTrainer`, nothing cut. Its head runs over the response rows, as on GPUs; on CPUs it would score every row."""
    import trl.trainer.utils
    from trl import DPOConfig, DPOTrainer

    trl.trainer.utils._use_triton = lambda device: True
    return DPOTrainer(model, args=DPOConfig(**arguments, max_length=None), **options)


def see_apart(trainer: PreferenceTrainer) -> PreferenceTrainer:
    """Have the vision tower run for every sequence, and again for the reference, as without shared features.

    A token tree has its pictures once; where sequences are apart, tower and projector run again for each branch but the first.
    """
    trainer.reference.shares_features = False
    again = 0 if trainer.args.tree_packing else len(trainer.args.branches) - 1

    def run_again(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        for _ in range(again):
            # Not by a call of the module, which would end here once more.
            module.forward(*args, **kwargs)

    base = model_parts.base_of(trainer.model)  # type: ignore[arg-type]
    family = family_of(base)
    inside = tuple(f"{name}." for name in family.vision)
    for name in (*family.vision, *(name for name in family.projector if not name.startswith(inside))):
        base.base_model.get_submodule(name).register_forward_hook(run_again, with_kwargs=True)
    return trainer


def reference_pass(trainer: PreferenceTrainer, count: int) -> None:
    """Cache the reference of the first `count` records in a new file, by the trainer's own means."""
    path = Path(_folder()) / "reference.jsonl"
    with trainer.reference.active():
        precompute(
            ReferenceCache(path, {}),
            trainer.reference.model,
            trainer.data_collator,  # type: ignore[arg-type]
            trainer.train_dataset.select(range(count)),  # type: ignore[union-attr]
            batch_size=count,
            autocast=trainer.accelerator.autocast,
            progress=_quiet(),
        )


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="training_step_")


def _folder() -> str:
    return tempfile.mkdtemp(dir=_scratch().name)


def _quiet() -> Progress:
    return Progress(Console(quiet=True))


def check_agreement(trainers: Mapping[str, Trainer], terms: int) -> None:
    """Every trainer's loss is `terms` log 2 at the start and, with the adapter moved, the same for the same records.

    Raises SystemExit where that does not hold. The adapters stay moved.
    """
    for name, trainer in trainers.items():
        if isinstance(trainer, PreferenceTrainer):
            trainer.precompute_reference()
        loss = loss_of(trainer, [0])
        if abs(loss - terms * math.log(2)) > 1e-5:
            raise SystemExit(f"{name}: loss {loss} at the start, expected {terms} log 2")
        warm(trainer.model)  # type: ignore[arg-type]
    for rows in ([0], [1, 2]):
        losses = {name: loss_of(trainer, rows) for name, trainer in trainers.items()}
        if max(losses.values()) - min(losses.values()) > 1e-4:
            raise SystemExit(f"losses of records {rows} differ: {losses}")


def warm(model: nn.Module) -> None:
    """Move the adapter off its starting point, where policy and reference agree; the same for models with the same parameters."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def loss_of(trainer: Trainer, rows: Sequence[int]) -> float:
    """Loss of the records `rows` as one batch, by the trainer's own collator and `compute_loss`."""
    batch = trainer.data_collator([trainer.train_dataset[row] for row in rows])  # type: ignore[index]
    batch = trainer._prepare_inputs(batch)
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model.train(), batch))  # type: ignore[union-attr]
