"""Files on a file system that fails for a while: read again until it is back, so that an outage is no missing picture."""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from mmdpo_trainers.errors import StageError

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE = 600.0
"""Seconds for which a file system that does not answer is asked again."""
_LONGEST = 30.0
"""Seconds between two tries, at most."""
_GONE = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN),
        *(
            errno.ENETUNREACH,
            errno.ECONNRESET,
            errno.ECONNREFUSED,
            errno.ECONNABORTED,
            errno.EREMOTEIO,
            errno.ENODEV,
            errno.ENXIO,
        ),
        *(errno.ESHUTDOWN, errno.ENOLINK, errno.ECOMM, errno.EPROTO),
    }
)
"""What network and FUSE file systems, and disks, say where the file is not at fault."""


def is_outage(error: BaseException) -> bool:
    """Whether the file system failed, and not the file."""
    return isinstance(error, OSError) and error.errno in _GONE


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is there. Raises OSError for an outage, where `os.path.isfile` says no: also for a folder in which files were found
    before, and which is gone now, or empty, as that of a mount that was lost is."""
    folder = os.path.dirname(path)
    try:
        found = stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError) as error:
        if is_outage(error):
            raise
        if folder in _folders and not _holds_files(folder):
            raise OSError(errno.ENODEV, "its folder is gone, or empty, and held files before", os.fspath(path)) from error
        return False
    if found:
        _folders.add(folder)
    return found


_folders: set[str] = set()
"""Those in which this process has found files."""


def _holds_files(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except FileNotFoundError:
        return False


def outlasting(read: Callable[P, T]) -> Callable[P, T]:
    """`read`, done again after an outage, with longer and longer waits; said once when it begins and once when it is over.

    Raises StageError after `PATIENCE` seconds: what would be read then is not missing, and nothing is to be counted as such.
    """

    @functools.wraps(read)
    def again(*args: P.args, **kwargs: P.kwargs) -> T:
        begun, pause = time.monotonic(), 1.0
        failed = False
        while True:
            try:
                found = read(*args, **kwargs)
            except OSError as error:
                if not is_outage(error):
                    raise
                what = f"{error.filename or _named(args)}: {str(error.strerror).lower()}"
                lasted = time.monotonic() - begun
                if lasted + pause > PATIENCE:
                    raise StageError(
                        f"{what}; the file system has not answered for {lasted / 60:.0f} min. Nothing is counted as missing, what was done so "
                        "far is kept, and the same command continues once it is back"
                    ) from error
                if not failed:
                    logger.warning("%s; read again for up to %d min, until the file system answers", what, PATIENCE // 60)
                failed = True
                time.sleep(pause)
                pause = min(_LONGEST, pause * 2)
            else:
                if failed:
                    logger.warning("%s is read again, after %d s", _named(args), time.monotonic() - begun)
                return found

    return again


def _named(args: tuple[object, ...]) -> str:
    return str(args[0])[:200] if args else "a file"


@outlasting
def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is there; a file system that fails is waited for."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError) as error:
        if is_outage(error):
            raise
        return False
