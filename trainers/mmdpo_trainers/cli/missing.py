"""What `mmdpo` says where packages are not there that an extra installs, or are older than it asks for."""

from __future__ import annotations

import importlib.metadata
import re

_PROJECT = "mmdpo-kernels"
_PROJECTS = {"yaml": "pyyaml", "PIL": "pillow"}
"""Module -> project, where their names differ."""


def remedy(error: ImportError, command: str) -> str | None:
    """One line about a failed import: what is missing or too old, and what to install; None where no extra is about it.

    command: what was asked for, such as `mmdpo run`.
    """
    wanted = _extras()
    module = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError):
        project = _PROJECTS.get(module, module).lower().replace("_", "-")
        extra = next((extra for extra, floors in wanted.items() if project in floors), None)
        if extra is None:
            return None
        return f"{command} needs {project}, which is not installed: pip install '{_PROJECT}[{extra}]'"
    for extra, floors in wanted.items():
        for project, floor in floors.items():
            found = _version(project)
            if floor and found and _numbers(found) < _numbers(floor):
                return (
                    f"{command} needs {project} {floor} or newer, and {found} is installed: pip install -U '{_PROJECT}[{extra}]'"
                )
    return None


def _extras() -> dict[str, dict[str, str]]:
    """Extra -> project -> oldest version, empty where any will do; `train` comes first, which the whole command needs."""
    found: dict[str, dict[str, str]] = {"train": {}}
    for line in importlib.metadata.requires(_PROJECT) or []:
        parts = re.match(r"([\w.-]+)(?:[^;]*>=([\d.]+))?.*extra == ['\"]([\w-]+)['\"]", line)
        if parts:
            project, floor, extra = parts.groups()
            found.setdefault(extra, {})[project.lower().replace("_", "-")] = floor or ""
    return found


def _version(project: str) -> str | None:
    try:
        return importlib.metadata.version(project)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> list[int]:
    return [int(each) for each in re.findall(r"\d+", version.partition("+")[0])[:3]]
