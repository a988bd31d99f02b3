"""Progress on a terminal as a bar, elsewhere (a log file, a pipe) as a line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from mmdpo_trainers import ranks


class ProgressTask:
    """One counted piece of work."""

    def __init__(self, owner: Progress, description: str, total: int | None, completed: int) -> None:
        self.description, self.total, self.completed = description, total, completed
        self._owner = owner
        self._note = ""
        self._printed = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count `steps` done; `note` is a few words shown beside the bar, such as the loss."""
        self.completed += steps
        self._note = note or self._note
        self._owner._show(self)

    @property
    def line(self) -> str:
        """The state in one line."""
        of = f"/{self.total}" if self.total is not None else ""
        return f"{self.description}: {self.completed}{of} {self._note}".rstrip()


class Progress:
    """Shows the work of a run, of several processes in the first one. `every`: seconds between lines where the output is not a terminal."""

    def __init__(self, console: Console | None = None, every: float = 15.0) -> None:
        self.console = console or Console(stderr=True, quiet=not ranks.is_main())
        self._every = every
        self._bars: RichProgress | None = None
        self._bar_of: dict[int, int] = {}

    def print(self, message: str) -> None:
        """One line above the bars."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def task(self, description: str, total: int | None = None, completed: int = 0) -> Iterator[ProgressTask]:
        """Show a task while the block runs; `completed` of `total` were done by an earlier, interrupted attempt."""
        task = ProgressTask(self, description, total, completed)
        if not self.console.is_terminal:
            yield task
            self.print(task.line)
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        outermost = self._bars is None
        bars = self._bars or RichProgress(*columns, console=self.console)
        if outermost:
            self._bars = bars
            bars.start()
        self._bar_of[id(task)] = bars.add_task(description, total=total, completed=completed, note="")
        try:
            yield task
        finally:
            del self._bar_of[id(task)]
            if outermost:
                bars.stop()
                self._bars = None

    def _show(self, task: ProgressTask) -> None:
        if self._bars is not None:
            self._bars.update(self._bar_of[id(task)], completed=task.completed, note=task._note)  # type: ignore[arg-type]
        elif time.monotonic() - task._printed >= self._every:
            task._printed = time.monotonic()
            self.print(task.line)
