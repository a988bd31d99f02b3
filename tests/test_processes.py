"""What the processes that tests start are forked from."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from processes import end_of, killed, start


def look(file: Path, imported: list[str]) -> None:
    threads = os.listdir("/proc/self/task") if sys.platform == "linux" else ["one"]
    file.write_text(f"{len(threads)} {os.environ['HERE']} {all(name in sys.modules for name in imported)} {os.getppid()}")
    print("to the output")
    raise ValueError("to the error")


def test_a_fork_of_one_thread_that_has_imported_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HERE", "changed")
    imported = ["torch", "transformers", "peft", "datasets", "mmdpo_trainers.training.trainer", "training_cases"]
    assert end_of([start(look, tmp_path / "a", imported, environment={"HERE": "own"})]) == [1]
    said = capfd.readouterr()
    assert said.out == "to the output\n" and "ValueError: to the error" in said.err
    assert end_of([start(look, tmp_path / "b", imported)]) == [1]
    (*first, one), (*second, other) = ((tmp_path / name).read_text().split() for name in "ab")
    assert first == ["1", "own", "True"] and second == ["1", "changed", "True"]
    # One server for all of them, which is not this process.
    assert one == other != str(os.getpid())


def kill_oneself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_failing_process_ends_the_others() -> None:
    assert end_of([start(os._exit, 3), start(signal.pause)]) == [3, -signal.SIGKILL]
    assert end_of([start(os._exit, 3), start(os._exit, 0)], lambda code: code == -signal.SIGKILL) == [3, 0]
    killed(kill_oneself)
