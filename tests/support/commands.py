"""The `mmdpo` command in a process of its own, which a test may kill at a moment of its choice."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from processes import end_of, start

from mmdpo_trainers.cli.main import main


class Kill(NamedTuple):
    """Once a file of the folder that fits the pattern has so many lines on disk."""

    folder: Path
    pattern: str
    lines: int


def command(*arguments: object, kill: Kill | None = None) -> int:
    """Run `mmdpo …` in another process and return its exit code, minus SIGKILL where it was killed.

    It is killed where it waits for the disk, so at the same place on a fast machine as on a busy one.
    """
    (code,) = end_of([start(_run, [str(each) for each in arguments], kill)])
    return code


def _run(arguments: Sequence[str], kill: Kill | None) -> None:
    torch.set_num_threads(1)
    fsync = os.fsync

    def fatal(descriptor: int) -> None:
        fsync(descriptor)
        assert kill is not None
        if any(path.read_bytes().count(b"\n") >= kill.lines for path in kill.folder.glob(kill.pattern)):
            os.kill(os.getpid(), signal.SIGKILL)

    if kill is not None:
        os.fsync = fatal
    sys.exit(main(arguments))
