"""Files that are there whole or not at all, and a full disk said in words that help."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mmdpo_trainers.errors import RunFolderError, StageError

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


def write_atomic(
    path: str | os.PathLike[str], content: str | bytes | Mapping[str, Any] | list[Any], *, durable: bool = True
) -> Path:
    """Write a file so that after a kill either the old or the whole new content is there.

    content: text, bytes, or a JSON-able mapping or list (written indented). durable=False does not wait for the disk: as safe
    against a killed process, not against a power cut. Returns the path.
    """
    if not isinstance(content, str | bytes):
        content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with replacing(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return Path(path)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path` at the end of the block; where the block raises, nothing is changed."""
    path = Path(path)
    kept = "What was in it before is kept" if path.exists() else "What other files hold is kept"
    with writing(path, kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


def read_json(path: str | os.PathLike[str], *, missing: Any = ...) -> Any:
    """Read one JSON file; the error of a broken one names it. missing: what there is in place of a file that does not exist."""
    if missing is not ... and not Path(path).exists():
        return missing
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path} is not valid JSON ({error}); restore it, or restart the stage that wrote it") from error
