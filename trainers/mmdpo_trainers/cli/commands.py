"""The parser of `mmdpo` with all its commands, each of a file of its own; they need what the extra `train` installs."""

from __future__ import annotations

from typing import Any

from mmdpo_trainers.cli import calibrate, check, export, init, reference, run, stage


def add(commands: Any) -> None:
    """Add every command but `env` to the parser's, in the order of its help."""
    for module in (init, run, stage, reference, calibrate, check, export):
        module.add(commands)
