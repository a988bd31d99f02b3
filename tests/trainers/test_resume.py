"""Training killed at any moment and started again ends with the same weights and the same log, bit for bit."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from processes import killed
from training_cases import config, preference_records, tiny
from transformers import TrainerCallback

from mmdpo_trainers.errors import RunFolderError
from mmdpo_trainers.training import checkpoints
from mmdpo_trainers.training.checkpoints import MARKER, defect, latest_complete, mark_complete, remove_old, replace_folder, start
from mmdpo_trainers.training.trainer import PreferenceTrainer
from mmdpo_trainers.training.training_log import LogFile

STEPS = 9


class KillAfter(TrainerCallback):
    """Kills the process when a step has ended, before anything of it is logged or saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train(model: Path, output: Path, *, full: bool = False, kill_after: int | None = None) -> None:
    """Three epochs over 10 records: 9 steps, a checkpoint every 2 and a log line every 3, so that the two are out of step."""
    torch.set_num_threads(1)
    loaded = tiny(model, torch.float32)
    settings = config(
        output,
        full_finetune=full,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=-1,
        num_train_epochs=3,
        save_strategy="steps",
        save_steps=2,
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        learning_rate=1e-3,
        max_grad_norm=1.0,
        attention_layer=1,
        loss_type=["sigmoid", "bco_pair", "nll"],
        bco_shift="previous",
        seed=7,
    )
    callbacks: list[TrainerCallback] = [LogFile(output / "log.jsonl")]
    trainer = PreferenceTrainer(
        loaded.model,
        settings,
        processing_class=loaded.processor,
        train_dataset=preference_records(10),
        eval_dataset=preference_records(3),
        callbacks=callbacks + ([] if kill_after is None else [KillAfter(kill_after)]),
    )
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == STEPS
    trainer.save_model(str(output / "final"))


def outcome(output: Path, full: bool = False) -> tuple[dict[str, torch.Tensor], str]:
    name = "model.safetensors" if full else "adapter_model.safetensors"
    return safetensors.torch.load_file(output / "final" / name), (output / "log.jsonl").read_text()


def assert_same(found: tuple[dict[str, torch.Tensor], str], expected: tuple[dict[str, torch.Tensor], str]) -> None:
    assert found[0].keys() == expected[0].keys()
    for name, weights in expected[0].items():
        assert torch.equal(found[0][name], weights), name
    assert found[1] == expected[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[dict[str, torch.Tensor], str]]:
    found = {}
    for full in (False, True):
        output = tmp_path_factory.mktemp("undisturbed")
        train(model, output, full=full)
        found[full] = outcome(output, full)
    return found


def test_undisturbed_log(undisturbed: Any) -> None:
    entries = [json.loads(line) for line in undisturbed[False][1].splitlines()]
    assert [(entry["step"], "loss" in entry) for entry in entries] == [(s, kind) for s in (3, 6, 9) for kind in (True, False)]
    assert all("eval_rewards/margins" in entry for entry in entries[1::2])


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("steps", [(1,), (3, 7), (5, 9)])
def test_killed_between_checkpoints(model: Path, tmp_path: Path, undisturbed: Any, full: bool, steps: tuple[int, ...]) -> None:
    for step in steps:
        killed(partial(train, model, tmp_path, full=full, kill_after=step))
    train(model, tmp_path, full=full)
    assert_same(outcome(tmp_path, full), undisturbed[full])
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


def train_and_die(model: Path, output: Path, moment: str) -> None:
    """Be killed when the third checkpoint comes to this part of it."""
    owner: Any = checkpoints if moment == "mark_complete" else PreferenceTrainer
    original = getattr(owner, moment)

    def fatal(*args: Any) -> Any:
        return die() if str(args[-1]).endswith("-6") else original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, moment, fatal)
        train(model, output)


@pytest.mark.parametrize("moment", ["_save_optimizer_and_scheduler", "_save_rng_state", "mark_complete"])
def test_killed_while_a_checkpoint_is_written(model: Path, tmp_path: Path, undisturbed: Any, moment: str) -> None:
    killed(train_and_die, model, tmp_path, moment)
    assert (tmp_path / "checkpoint-6").exists() and defect(tmp_path / "checkpoint-6") is not None
    train(model, tmp_path)
    assert_same(outcome(tmp_path), undisturbed[False])


@pytest.mark.parametrize("file", ["optimizer.pt", "adapter_model.safetensors", MARKER])
def test_truncated_checkpoint_is_passed_over(
    model: Path, tmp_path: Path, undisturbed: Any, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    killed(partial(train, model, tmp_path, kill_after=7))
    broken = tmp_path / "checkpoint-6" / file
    os.truncate(broken, broken.stat().st_size // 2)
    train(model, tmp_path)
    assert "checkpoint-6: skipped" in caplog.text
    assert_same(outcome(tmp_path), undisturbed[False])


def test_latest_complete(tmp_path: Path) -> None:
    messages: list[str] = []
    for step in (8, 9, 10, 11, 12):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if step != 12:
            start(folder)
        (folder / "weights").write_bytes(b"12345678")
        if step < 11:
            mark_complete(folder)
    (tmp_path / "checkpoint-10" / "weights").unlink()
    (tmp_path / "checkpoint-of-mine").mkdir()
    assert latest_complete(tmp_path, report=messages.append) == tmp_path / "checkpoint-9"
    left = [f"checkpoint-{name}" for name in ("10", "12", "8", "9", "of-mine")]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert [message.split("checkpoint-")[1] for message in sorted(messages)] == [
        "10: skipped, weights is missing",
        "11: removed, it was not written to its end",
        "12: skipped, it was not written by this trainer",
    ]
    assert latest_complete(tmp_path / "nowhere") is None


def test_start_replaces_only_what_it_began(tmp_path: Path) -> None:
    mine, other = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    start(mine)
    (mine / "weights").write_text("old")
    mark_complete(mine)
    start(mine)
    assert defect(mine) is not None and not (mine / "weights").exists()
    other.mkdir()
    (other / "weights").write_text("theirs")
    with pytest.raises(RunFolderError, match="checkpoint-2 was not written by this trainer"):
        start(other)
    assert [path.name for path in other.iterdir()] == ["weights"]


def test_remove_old(tmp_path: Path) -> None:
    for age, step in enumerate((9, 1, 2, 3)):
        folder = tmp_path / f"checkpoint-{step}"
        start(folder)
        mark_complete(folder)
        os.utime(folder / MARKER, (age, age))
    remove_old(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 4
    remove_old(tmp_path, 2, keep=str(tmp_path / "checkpoint-9"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-9"]


@pytest.mark.parametrize("resume", [None, "auto"])
def test_checkpoints_of_others_are_left_alone(
    model: Path, tmp_path: Path, resume: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "checkpoint-50"
    other.mkdir()
    (other / "weights").write_text("theirs")
    loaded = tiny(model, torch.float32)
    settings = config(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    trainer = PreferenceTrainer(loaded.model, settings, processing_class=loaded.processor, train_dataset=preference_records(4))
    trainer.train(resume_from_checkpoint=resume)
    assert (other / "weights").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3", "checkpoint-50"]
    assert ("checkpoint-50: skipped" in caplog.text) == (resume is not None)


def test_killed_removal_leaves_no_broken_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        start(tmp_path / f"checkpoint-{step}")
        mark_complete(tmp_path / f"checkpoint-{step}")

    def fatal(folder: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", fatal)
    with pytest.raises(KeyboardInterrupt):
        remove_old(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_replace_folder(tmp_path: Path) -> None:
    for content in ("old", "new"):
        temporary = tmp_path / ".final.tmp"
        temporary.mkdir()
        (temporary / "weights").write_text(content)
        replace_folder(temporary, tmp_path / "final")
        assert (tmp_path / "final" / "weights").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_resuming_without_a_whole_checkpoint(model: Path, tmp_path: Path) -> None:
    loaded = tiny(model, torch.float32)
    trainer = PreferenceTrainer(
        loaded.model, config(tmp_path), processing_class=loaded.processor, train_dataset=preference_records(4)
    )
    with pytest.raises(ValueError, match="has no whole checkpoint; pass 'auto'"):
        trainer.train(resume_from_checkpoint=True)
