"""`python killed_command.py FOLDER PATTERN LINES …`: the `mmdpo` command …, killed once a file of the folder has so many lines on disk.

It is killed where it waits for the disk, so at the same place on a fast machine as on a busy one.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from mmdpo_trainers.cli.main import main

folder, pattern, lines, *arguments = sys.argv[1:]
fsync = os.fsync


def fatal(descriptor: int) -> None:
    fsync(descriptor)
    if any(path.read_bytes().count(b"\n") >= int(lines) for path in Path(folder).glob(pattern)):
        os.kill(os.getpid(), signal.SIGKILL)


os.fsync = fatal
sys.exit(main(arguments))
