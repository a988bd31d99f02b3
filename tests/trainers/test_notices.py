"""What reaches the console of a command: its own lines, what users can act on, and no notices between libraries."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from report_run import picture, write_lines
from rich.console import Console
from tiny_models import make_tiny_llava

from mmdpo_trainers.processes import notices
from mmdpo_trainers.processes import progress as progress_module
from mmdpo_trainers.processes.progress import Progress

OWN = re.compile(
    r"train: starting|train: layout: TRL; [\d,]+ pairs|"
    r"(reference: )?[a-z -]+( records)?: [\d,]+(/[\d,]+)?( records: [\d,]+ cached, [\d,]+ computed in .*)?"
)
"""A line of progress, or what the data is."""


def say() -> None:
    logging.getLogger("DeepSpeed").warning("Setting accelerator to %s", "CPU. If you have GPU, we were unable to detect it.")
    logging.getLogger("DeepSpeed").warning("the disk is full")
    warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
    warnings.warn("`warmup_ratio` is deprecated", FutureWarning, stacklevel=1)


def test_named_notices_are_kept_in_the_run_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with notices.aside():
            say()
            assert not list(tmp_path.iterdir())
            notices.keep_in(tmp_path)
            say()
        kept = (tmp_path / notices.FILE).read_text().splitlines()
        assert [line.split(": ", 1)[1].split()[0] for line in kept] == ["Setting", "`is_gradient_checkpointing`"] * 2
        assert caplog.messages == ["the disk is full"] * 2
        assert [str(each.message) for each in seen] == ["`warmup_ratio` is deprecated"] * 2, "users can act on these"
        say()
    assert len(caplog.messages) == 4 and len(seen) == 4, "only while a command runs"


def test_a_training_says_its_own_lines_alone(tmp_path: Path) -> None:
    """In a process of its own, where every library is imported anew."""
    model, pairs = make_tiny_llava(tmp_path / "model"), tmp_path / "pairs.jsonl"
    picture(tmp_path / "red.png", "red")
    pair = {"prompt": "<image>\nWhat colour is the circle?", "chosen": "red", "rejected": "blue", "images": ["red.png"]}
    write_lines(pairs, [{"id": f"p{index}", **pair} for index in range(4)])
    flags = ["--method", "mdpo", "--input", str(pairs), "--model", str(model), "--threads", "1", "--dtype", "float32"]
    flags += [
        "--args",
        "{per_device_train_batch_size: 4, max_steps: 1, gradient_checkpointing: true, bf16: false, full_finetune: true}",
    ]
    command = [sys.executable, "-m", "mmdpo_trainers.cli.main", "train", "--run", str(tmp_path / "run"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    foreign = [line for line in done.stderr.splitlines() if not OWN.fullmatch(line)]
    assert foreign == [], foreign
    told = yaml.safe_load(done.stdout)
    assert list(told) == ["train"] and Path(told["train"]["trained"]) == tmp_path / "run" / "train" / "final"
    log = tmp_path / "run" / notices.FILE
    assert not log.exists() or all(re.match(r"[\d-]+ [\d:]+ \S+: ", line) for line in log.read_text().splitlines())


def test_a_log_of_a_day_has_some_hundred_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now, output = [0.0], io.StringIO()
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    lines = []
    with Progress(Console(file=output, width=80)).task("train", 86_400) as task:
        for second in range(1, 86_401):
            now[0] = float(second)
            task.advance()
            if second in (60, 600, 86_400):
                lines.append(len(output.getvalue().splitlines()))
    assert 3 <= lines[0] <= 4 and 15 <= lines[1] <= 30 and 150 <= lines[2] <= 250


def test_a_note_goes_with_what_it_is_about() -> None:
    output = io.StringIO()
    with Progress(Console(file=output, width=80), every=0.0).task("reference", 2) as task:
        task.advance(note="about 2 min left")
        task.advance(note="")
    assert output.getvalue().splitlines() == ["reference: 1/2 about 2 min left", "reference: 2/2"]
