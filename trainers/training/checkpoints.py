"""Which checkpoints are whole: a marker, written last and atomically, lists every file with its size."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from mmdpo_trainers.errors import RunFolderError
from mmdpo_trainers.run_folder import read_json, write_atomic

MARKER = "complete.json"

_NAME = re.compile(r"checkpoint-(\d+)")


def mark_complete(folder: str | os.PathLike[str]) -> None:
    """Flush every file of a checkpoint to disk, then write its marker."""
    folder = Path(folder)
    sizes = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    write_atomic(folder / MARKER, {"files": sizes})


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
    """The last whole checkpoint of a folder, or None. Those that are not whole are removed, each with a message."""
    found = []
    for folder in sorted(Path(output_dir).glob("checkpoint-*")):
        match = _NAME.fullmatch(folder.name)
        if match is None or not folder.is_dir():
            continue
        reason = defect(folder)
        if reason is None:
            found.append((int(match[1]), folder))
        else:
            report(f"{folder}: removed, {reason}")
            shutil.rmtree(folder)
    return max(found)[1] if found else None


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
