"""BCO's running reward shift: over records or micro-batches, steps and processes, kept in checkpoints, and in the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid
from training_cases import config, preference_records, tiny, warm_adapter
from transformers import TrainerCallback

from mmdpo_trainers.training import head
from mmdpo_trainers.training.running_shift import RunningShift
from mmdpo_trainers.training.trainer import PreferenceTrainer

CPU = torch.device("cpu")
MPO: dict[str, Any] = {"loss_type": ["sigmoid", "bco_pair", "nll"], "loss_weights": [0.8, 0.2, 1.0]}


class RunningMoments:
    """The mean of TRL 0.10's class of this name, as MPO's released trainer feeds it: one number a micro-batch and process."""

    def __init__(self) -> None:
        self.mean, self.count = torch.zeros((), dtype=torch.float64), 1e-24

    def update(self, values: torch.Tensor) -> None:
        delta, count = values.mean() - self.mean, values.numel()
        self.mean += delta * count / (self.count + count)
        self.count += count


def test_present_is_the_released_codes_mean() -> None:
    released, ours = RunningMoments(), RunningShift("present")
    torch.manual_seed(0)
    for count in (4, 4, 1, 3):
        rewards = torch.randn(2 * count, dtype=torch.float64)
        released.update(rewards.mean().detach())
        ours.take(rewards.mean().item(), count, CPU)
        assert ours.value == pytest.approx(released.mean.item(), rel=1e-12)
    before = ours.value
    ours.take(9.0, 0, CPU)
    assert ours.value == before


def test_previous_is_the_mean_over_the_records_of_steps_before() -> None:
    ours = RunningShift("previous")
    for step in ([(1.0, 2), (4.0, 1)], [(2.0, 3)]):
        before = ours.value
        for rewards, count in step:
            ours.take(rewards, count, CPU)
            assert ours.value == before
        ours.step(CPU)
    assert ours.value == pytest.approx((1.0 * 2 + 4.0 + 2.0 * 3) / 6)
    other = RunningShift("previous")
    other.load(ours.state())
    assert other.value == ours.value


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llava")


def trained(folder: Path, output: Path, **options: Any) -> tuple[PreferenceTrainer, list[dict[str, Any]]]:
    settings: dict[str, Any] = {"max_steps": 3, "train_sampling_strategy": "sequential", **MPO, **options}
    callbacks = settings.pop("callbacks", None)
    trainer = PreferenceTrainer(
        tiny(folder).model,
        config(output, **settings),
        processing_class=tiny(folder).processor,
        train_dataset=preference_records(12),
        callbacks=callbacks,
    )
    warm_adapter(trainer)
    trainer.train(resume_from_checkpoint="auto")
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["none", "previous", "present"])
def test_losses_and_log(folder: Path, tmp_path: Path, kind: str) -> None:
    """Three steps of two micro-batches of two records each; nothing moves, so that all rewards can be had at once."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.0}
    trainer, log = trained(folder, tmp_path, bco_shift=kind, **options)
    batch = trainer.data_collator.batch(preference_records(12))
    policy = head.batch_logps(trainer.model, batch)
    with trainer.reference.active():
        reference = head.batch_logps(trainer.reference.model, batch)
    w, lose = (0.1 * (policy - reference)).unbind(1)
    means = (w + lose) / 2
    for step, entry in enumerate(log):
        shifts = []
        for micro in range(2):
            first = 4 * step + 2 * micro
            # Micro-batches of one size count alike here.
            present, previous = means[: first + 2].mean(), means[: 4 * step].mean() if step else torch.zeros(())
            shifts.append({"none": 0.0, "previous": float(previous), "present": float(present)}[kind])
        mine = slice(4 * step, 4 * step + 4)
        s = torch.tensor(shifts, dtype=torch.float64).repeat_interleave(2)
        bco = -logsigmoid(w[mine] - s) - logsigmoid(s - lose[mine])
        nll = -policy[mine, 0].sum() / batch.lengths[mine, 0].sum()
        expected = (0.8 * -logsigmoid(w[mine] - lose[mine]) + 0.2 * bco).mean() + nll
        assert entry["loss"] == pytest.approx(float(expected), rel=1e-6)
        if kind == "none":
            assert "bco_shift" not in entry
        else:
            assert entry["bco_shift"] == pytest.approx(sum(shifts) / 2, rel=1e-6)
    assert abs(float(means.mean())) > 1e-3


def test_previous_does_not_depend_on_micro_batches(folder: Path, tmp_path: Path) -> None:
    logs = [
        trained(
            folder,
            tmp_path / str(size),
            bco_shift="previous",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            learning_rate=1e-3,
        )[1]
        for size in (1, 4)
    ]
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-9)


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


@pytest.mark.parametrize("kind", ["previous", "present"])
def test_a_continued_run_ends_as_an_undisturbed_one(folder: Path, tmp_path: Path, kind: str) -> None:
    options = {"bco_shift": kind, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 2}
    whole, log = trained(folder, tmp_path / "whole", **options)
    trained(folder, tmp_path / "parts", callbacks=[StopAfter(3)], **options)
    for checkpoint in (tmp_path / "parts").glob("checkpoint-[34]"):
        checkpoint.rename(tmp_path / f"gone-{checkpoint.name}")
    continued, last = trained(folder, tmp_path / "parts", **options)
    assert continued.objective.shift.state() == whole.objective.shift.state() and whole.objective.shift.value != 0
    assert [entry["loss"] for entry in last] == [entry["loss"] for entry in log]
    mine, theirs = (dict(each.model.named_parameters()) for each in (continued, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_other_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bco_shift: expected one of none, previous, present, got 'running'"):
        config(tmp_path, bco_shift="running")
