"""A full disk, said in words that help."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mmdpo_trainers.errors import StageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space left, over quota, over the limit on a file's size."""


def free_mib(path: str | os.PathLike[str]) -> int:
    """MiB that are free where `path` is, or would be."""
    path = Path(path).absolute()
    folder = next(each for each in (path, *path.parents) if each.is_dir())
    return round(shutil.disk_usage(folder).free / 2**20)


def folder_bytes(folder: str | os.PathLike[str]) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], kept: str) -> Iterator[None]:
    """Raise StageError where the block cannot write `path` because the disk is full. kept: what there still is, as a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        reason = os.strerror(error.errno).lower()
        raise StageError(
            f"{path} cannot be written: {reason} ({free_mib(path)} MiB are free there). {kept}. Make room, or raise the limit, and start the "
            "same command again: it continues"
        ) from error
