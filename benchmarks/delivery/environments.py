"""Virtual environments of their own below build/, and commands in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = ROOT / "constraints.txt"
# In the order in which they are looked for; newer ones than the last are not known to this project.
PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14")


class Failed(RuntimeError):
    """A command failed; the message has the end of what it said."""


def run(command: Sequence[object], *, environment: Mapping[str, str] | None = None, folder: Path | None = None) -> str:
    """What a command writes. Raises `Failed`."""
    words = [str(word) for word in command]
    everything = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **(environment or {})}
    done = subprocess.run(words, capture_output=True, text=True, env=everything, cwd=folder)
    if done.returncode:
        raise Failed(f"{' '.join(words[:4])} … ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


def interpreters(wanted: Sequence[str]) -> dict[str, str]:
    """Version (3.12) -> program, of those named that run here. A name may be a path."""
    found: dict[str, str] = {}
    for name in wanted:
        program = shutil.which(name)
        if program is None:
            continue
        try:
            version = run([program, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]).strip()
        except Failed:  # a shim of a version that is not installed
            continue
        found.setdefault(version, program)
    return found


def make(program: str, folder: Path, requirements: Sequence[str] = (), *, constrained: bool = True) -> Path:
    """The Python of a virtual environment in `folder`, made anew where it was not finished with these requirements.

    constrained: whether versions are those of constraints.txt.
    """
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join(requirements)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    run([program, "-m", "venv", folder])
    if requirements:
        pip(python, requirements, constrained=constrained)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def pip(python: Path, arguments: Sequence[object], *, constrained: bool = True) -> None:
    """pip install."""
    run([python, "-m", "pip", "install", "-q", *arguments, *(["-c", CONSTRAINTS] if constrained else [])])
