"""Notices of libraries that nobody who runs `mmdpo` can do anything about: kept in the run folder in place of the console.

Only while a command runs, never for those who import the package. Each notice is named here; whatever else a library says, it says.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

FILE = "notices.log"
"""In the run folder."""

_LOGGED = {
    # Said on CPUs wherever DeepSpeed is installed, used or not.
    "DeepSpeed": "Setting accelerator to CPU.",
    # Said on import, on some CPUs, of a product of 4-bit weights that `models.quantized` switches off.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}
"""Logger -> how the notice begins."""
_WARNED = (
    # PEFT asks transformers for it.
    "`is_gradient_checkpointing` is deprecated",
)
"""How future warnings begin."""


class _Kept:
    """Notices that wait for a folder, and those that are written."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._waiting: list[str] = []

    def add(self, source: str, text: str) -> None:
        self._waiting.append(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {source}: {' '.join(text.split())}\n")
        self.write()

    def write(self) -> None:
        if self.folder is None or not self._waiting:
            return
        # Half a line after a kill, or a full disk, is no reason to end a run.
        with contextlib.suppress(OSError), (self.folder / FILE).open("a", encoding="utf-8") as file:
            file.writelines(self._waiting)
            self._waiting.clear()


class _Aside(logging.Filter):
    """Takes one notice out of a logger."""

    def __init__(self, begins: str, kept: _Kept) -> None:
        super().__init__()
        self._begins, self._kept = begins, kept

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if not text.startswith(self._begins):
            return True
        self._kept.add(record.name, text)
        return False


_commands: list[_Kept] = []


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """While it lasts, the notices named above do not reach the console."""
    kept = _Kept()
    filters = {name: _Aside(begins, kept) for name, begins in _LOGGED.items()}
    shown = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, FutureWarning) and str(message).startswith(_WARNED):
            kept.add(f"{filename}:{lineno}", str(message))
        else:
            shown(message, category, filename, lineno, file, line)

    for name, each in filters.items():
        logging.getLogger(name).addFilter(each)
    warnings.showwarning = show
    _commands.append(kept)
    try:
        yield
    finally:
        _commands.remove(kept)
        warnings.showwarning = shown
        for name, each in filters.items():
            logging.getLogger(name).removeFilter(each)


def keep_in(folder: Path) -> None:
    """The folder of the run that the command is about, which exists: what it keeps aside is written there from now on, and before."""
    for kept in _commands:
        kept.folder = folder
        kept.write()
