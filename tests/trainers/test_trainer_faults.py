"""What stops a training: what the user is told, and what is kept."""

from __future__ import annotations

import errno
import math
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import Gradients, config, preference_records, tiny

from mmdpo_trainers.errors import RunFolderError
from mmdpo_trainers.training.checkpoints import MARKER, defect, latest_complete
from mmdpo_trainers.training.stopping import NonFiniteLossError
from mmdpo_trainers.training.trainer import PreferenceTrainer

SAVED: dict[str, Any] = {
    "max_steps": 3,
    "save_strategy": "steps",
    "save_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture
def small_files() -> Iterator[Any]:
    """Lets files grow to so many bytes only: the system then says EFBIG, as it says ENOSPC on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def trainer_of(folder: Path, output: Path, **options: Any) -> PreferenceTrainer:
    loaded = tiny(folder, torch.float32)
    return PreferenceTrainer(
        loaded.model, config(output, **options), processing_class=loaded.processor, train_dataset=preference_records(6)
    )


def weights(trainer: PreferenceTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_step(folder: Path, tmp_path: Path, value: float) -> None:
    whole = trainer_of(folder, tmp_path / "whole", **SAVED)
    whole.train()
    trainer = trainer_of(folder, tmp_path / "stopped", **SAVED)
    loss = trainer.objective.loss
    names: list[str] = []

    def spoilt(batch: Any, *args: Any, **options: Any) -> Any:
        found, parts = loss(batch, *args, **options)
        names[:] = batch.ids
        return (found * value if trainer.state.global_step == 2 else found), parts

    trainer.objective.loss = spoilt  # type: ignore[method-assign]
    with pytest.raises(
        NonFiniteLossError, match=r"step 3: the loss is not finite; records .*: loss (nan|inf) \(sigmoid"
    ) as error:
        trainer.train()

    assert ", ".join(names) in str(error.value)
    last = latest_complete(tmp_path / "stopped")
    assert last is not None and last.name == "checkpoint-2"
    assert f"The step was not taken; {last} is whole, and training continues from it" in str(error.value)
    assert all(parameter.isfinite().all() for parameter in weights(trainer).values())
    again = trainer_of(folder, tmp_path / "stopped", **SAVED)
    again.train(resume_from_checkpoint="auto")
    for name, tensor in weights(again).items():
        assert torch.equal(tensor, weights(whole)[name])


def test_the_check_can_be_left_out(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path, max_steps=1, stop_on_nonfinite_loss=False)
    loss = trainer.objective.loss
    trainer._loss = lambda *args: (loss(*args)[0] * math.nan, {})  # type: ignore[method-assign]
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_full_disk_keeps_the_checkpoint_before(folder: Path, tmp_path: Path, small_files: Any) -> None:
    """Room for a checkpoint's smaller files only."""
    whole = trainer_of(folder, tmp_path / "whole", **SAVED, save_total_limit=5)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "full" / "checkpoint-1")
    trainer = trainer_of(folder, tmp_path / "full", **SAVED)

    small_files(20_000)
    with pytest.raises(
        RunFolderError, match=r"checkpoint-2: the disk is full .* MiB are free.*checkpoint-1 is whole, and training continues"
    ) as error:
        trainer.train(resume_from_checkpoint="auto")
    small_files(resource.RLIM_INFINITY)

    assert "Make room" in str(error.value)
    assert not (tmp_path / "full" / "checkpoint-2" / MARKER).exists() and defect(tmp_path / "full" / "checkpoint-1") is None
    found = latest_complete(tmp_path / "full", report=lambda message: None)
    assert found is not None and found.name == "checkpoint-1"
    again = trainer_of(folder, tmp_path / "full", **SAVED)
    again.train(resume_from_checkpoint="auto")
    for name, tensor in weights(again).items():
        assert torch.equal(tensor, weights(whole)[name])


def test_other_errors_of_a_checkpoint_stay_what_they_are(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(folder, tmp_path, **SAVED)
    monkeypatch.setattr(torch, "save", lambda *a, **k: (_ for _ in ()).throw(OSError(errno.EACCES, "Permission denied")))
    with pytest.raises(PermissionError):
        trainer.train()


@pytest.mark.parametrize("full", [False, True])
def test_offloaded_activations_change_no_gradient(folder: Path, tmp_path: Path, full: bool) -> None:
    found = []
    for offload in (False, True):
        loaded, gradients = tiny(folder, torch.float32), Gradients()
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        trainer = PreferenceTrainer(
            loaded.model,
            config(tmp_path, full_finetune=full, activation_offloading=offload, **options),
            processing_class=loaded.processor,
            train_dataset=preference_records(4),
            callbacks=[gradients],
        )
        trainer.train()
        offloaded = [
            type(module.__dict__.get("_gradient_checkpointing_func")).__name__ == "_Offloaded"
            for module in trainer.model.modules()
        ]
        # Three layers of text and two of the vision tower, at least.
        assert sum(offloaded) >= 5 if offload else not any(offloaded)
        found.append(gradients.steps[0])
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name])


def test_offloading_needs_checkpointing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="activation_offloading.*set gradient_checkpointing too"):
        config(tmp_path, activation_offloading=True)
