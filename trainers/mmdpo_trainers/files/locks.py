"""Locks of files, which the kernel drops with the process that held them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

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


@contextlib.contextmanager
def appending(path: Path) -> Iterator[BinaryIO]:
    """The file at `path`, made where there is none, open for reading and appending, by one process after the other.

    It stays open after the block, unlocked: as long as it is, no other file can get its inode number.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+b")
        fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        # It was replaced while this process waited.
        file.close()
    try:
        yield file
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
