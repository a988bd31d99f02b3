"""Locks of files, which the kernel drops with the process that held them."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from mmdpo_trainers.errors import RunFolderError

_HELD = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)


def take(file: IO[bytes], held: Callable[[], str]) -> None:
    """Lock an open file for this process alone. Raises RunFolderError: what `held` says where another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise RunFolderError(held()) from error
        raise RunFolderError(
            f"{file.name} cannot be locked ({os.strerror(error.errno or 0).lower()}): expected a file system with locks, without which two "
            f"processes could write one file; put the run folder on another than that of {Path(file.name).parent}, or mount it with locks"
        ) from error
