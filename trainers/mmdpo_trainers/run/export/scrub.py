"""Settings of a run without what is of one machine: folders become their last name, addresses a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ADDRESS = "(an address)"


def scrubbed(value: Any) -> Any:
    """The same settings with paths reduced to their last name, wherever they stand."""
    if isinstance(value, dict):
        return {key: scrubbed(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [scrubbed(each) for each in value]
    return _text(value) if isinstance(value, str) else value


def _text(value: str) -> str:
    if "://" in value and not any(c.isspace() for c in value):
        return ADDRESS
    is_path = value.startswith(("/", "~", "./", "../", "\\\\")) or value[1:3] == ":\\"
    return Path(value.replace("\\", "/")).name if is_path and "\n" not in value else value
