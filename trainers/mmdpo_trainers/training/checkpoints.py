"""Which checkpoints are ours, by a marker written first, and whole, by one written last that lists every file with its size."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from mmdpo_trainers.errors import RunFolderError
from mmdpo_trainers.files.atomic import FULL, free_mib, read_json, write_atomic

STARTED = "started.json"
MARKER = "complete.json"

_NAME = re.compile(r"checkpoint-(\d+)")


def start(folder: str | os.PathLike[str]) -> None:
    """Put an empty checkpoint, marked as begun here, in place of an earlier one.

    Raises RunFolderError where the folder holds something that was not begun here.
    """
    folder = Path(folder)
    if folder.is_dir() and not _is_ours(folder) and any(folder.iterdir()):
        raise RunFolderError(f"{folder} was not written by this trainer; move it away, or train into another folder")
    temporary = folder.with_name(f".{folder.name}.new")
    write_atomic(temporary / STARTED, {})
    replace_folder(temporary, folder)


def _is_ours(folder: Path) -> bool:
    return (folder / STARTED).is_file() or (folder / MARKER).is_file()


def mark_complete(folder: str | os.PathLike[str]) -> None:
    """Flush every file of a checkpoint to disk, then write its marker."""
    folder = Path(folder)
    sizes = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    write_atomic(folder / MARKER, {"files": sizes})


@contextlib.contextmanager
def writing(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Write a checkpoint inside. Raises RunFolderError where the disk is full, naming what is kept."""
    folder = Path(folder)
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_full(error):
            raise
        last = newest(folder.parent, other_than=folder)
        kept = "there is none before it" if last is None else f"{last} is whole, and training continues from it"
        raise RunFolderError(
            f"{folder}: the disk is full ({free_mib(folder)} MiB are free), and this checkpoint is half written "
            f"({' '.join(str(error).split())}); {kept}. Make room, or lower save_total_limit, and start again"
        ) from error


def _is_full(error: BaseException) -> bool:
    """Also where a library has put the system's error into words of its own."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    # torch.save reports no reason, only that it could not write.
    words = (
        "No space left",
        "os error 28",
        "File too large",
        "os error 27",
        "quota exceeded",
        "PytorchStreamWriter failed",
        "unexpected pos",
    )
    return any(word.lower() in str(error).lower() for word in words)


def defect(folder: str | os.PathLike[str]) -> str | None:
    """Why a checkpoint cannot be resumed from, or None where it is whole."""
    folder = Path(folder)
    if not (folder / MARKER).is_file():
        return "it was not written to its end"
    try:
        sizes = read_json(folder / MARKER)["files"]
    except RunFolderError as error:
        return str(error)
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
    return None


def latest_complete(output_dir: str | os.PathLike[str], *, report: Callable[[str], None] = print) -> Path | None:
    """The last whole checkpoint of a folder, or None.

    Each that is not whole is reported; those that `start` began and nobody ended are removed.
    """
    found = []
    for folder in sorted(Path(output_dir).glob("checkpoint-*")):
        match = _NAME.fullmatch(folder.name)
        if match is None or not folder.is_dir():
            continue
        reason = defect(folder)
        if reason is None:
            found.append((int(match[1]), folder))
        elif (folder / MARKER).exists():
            report(f"{folder}: skipped, {reason}")
        elif (folder / STARTED).is_file():
            report(f"{folder}: removed, {reason}")
            _remove(folder)
        else:
            report(f"{folder}: skipped, it was not written by this trainer")
    return max(found)[1] if found else None


def newest(output_dir: str | os.PathLike[str], *, other_than: Path | None = None) -> Path | None:
    """The whole checkpoint completed last, or None; nothing is reported or removed."""
    whole = [path for path in Path(output_dir).glob("checkpoint-*") if path != other_than and defect(path) is None]
    return max(whole, key=lambda path: (path / MARKER).stat().st_mtime_ns, default=None)


def remove_old(output_dir: str | os.PathLike[str], limit: int | None, *, keep: str | None = None) -> None:
    """Remove the checkpoints completed first until `limit` complete ones are left, never `keep`.

    Folders without the last marker are neither counted nor removed. limit: None or 0 removes nothing.
    """
    if not limit:
        return
    markers = sorted(Path(output_dir).glob(f"checkpoint-*/{MARKER}"), key=lambda marker: marker.stat().st_mtime_ns)
    folders = [marker.parent for marker in markers if _NAME.fullmatch(marker.parent.name)]
    removable = [folder for folder in folders[:-1] if keep is None or folder != Path(keep)]
    for folder in removable[: max(len(folders) - limit, 0)]:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Under another name first: a kill must not leave a checkpoint without its markers."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder in its place. After a kill, `final` is the old one, the new one, or not there; never half of one."""
    if final.exists():
        doomed = final.with_name(f".{final.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(final, doomed)
        os.replace(temporary, final)
        shutil.rmtree(doomed)
    else:
        os.replace(temporary, final)
