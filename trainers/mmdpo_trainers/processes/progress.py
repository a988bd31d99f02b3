"""Progress on a terminal as a bar, elsewhere (a log file, a pipe) as a line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from mmdpo_trainers.files.atomic import folder_bytes, free_mib
from mmdpo_trainers.processes import ranks

_SAMPLE = 16
"""Pieces by which the rest is estimated."""
_LONG_SECONDS = 60.0
_SOON_SECONDS, _SELDOM = 300.0, 40
"""Lines become fewer as a task goes on: half as many after so many seconds, in the end one for so many. A day is 200 lines of a log."""
_MUCH_BYTES = 2**28


class ProgressTask:
    """One counted piece of work."""

    def __init__(self, owner: Progress, description: str, total: int | None, completed: int, folder: Path | None) -> None:
        self.description, self.total, self.completed = description, total, completed
        self._owner, self._folder = owner, folder
        # When the first piece was done, which pays for loading a model, and how many there were then.
        self._first: tuple[float, int] | None = None
        self._said = False
        self._note = ""
        self._printed = self._begun = time.monotonic()
        self._last_line = ""

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """Count `steps` done; `note` is a few words shown beside the bar, such as the loss, until there are others."""
        self.completed += steps
        self._note = self._note if note is None else note
        if self._first is None:
            self._first = time.monotonic(), self.completed
        elif not self._said and self.completed - self._first[1] >= _SAMPLE:
            self._said = True
            self._estimate()
        self._owner._show(self)

    @property
    def seconds_left(self) -> float | None:
        """By the rate so far; None where there is none yet, or no end is known."""
        if self.total is None or self._first is None or self.completed == self._first[1]:
            return None
        return (time.monotonic() - self._first[0]) / (self.completed - self._first[1]) * (self.total - self.completed)

    @property
    def line(self) -> str:
        """The state in one line, with the time that is left where that is more than a minute."""
        of = f"/{self.total}" if self.total is not None else ""
        left = self.seconds_left or 0.0
        ahead = f", about {_duration(left)} left" if left > _LONG_SECONDS else ""
        return f"{self.description}: {self.completed}{of}{ahead} {self._note}".rstrip()

    def _estimate(self) -> None:
        """Say once what time and disk the rest takes, where that is much, and warn where the disk is too small for it."""
        left, missing = self.seconds_left, (self.total or self.completed) - self.completed
        more = 0 if self._folder is None else folder_bytes(self._folder) * missing // self.completed
        free = None if self._folder is None else free_mib(self._folder) * 2**20
        if free is not None and more > free:
            self._owner.print(
                f"{self.description}: warning: the {missing:,} that are missing need about {_size(more)} at the size of the first "
                f"{self.completed:,}, and {_size(free)} are free in {self._folder}; make room, or make fewer"
            )
        elif (left or 0) > _LONG_SECONDS or more > _MUCH_BYTES:
            disk = f" and {_size(more)} of disk, of which {_size(free)} are free" if free is not None else ""
            self._owner.print(
                f"{self.description}: {missing:,} more take about {_duration(left or 0)}{disk}, by the first {self.completed:,}"
            )


def _duration(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


class Progress:
    """Shows the work of a run, of several processes in the first one. `every`: seconds between lines where the output is not a terminal, at
    least: they become fewer as a stage goes on."""

    def __init__(self, console: Console | None = None, every: float = 15.0) -> None:
        self.console = console or Console(stderr=True, quiet=not ranks.is_rank_0())
        self._every = every
        self._bars: RichProgress | None = None
        self._bar_of: dict[int, int] = {}

    def print(self, message: str) -> None:
        """One line above the bars."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def task(
        self, description: str, total: int | None = None, completed: int = 0, folder: Path | None = None
    ) -> Iterator[ProgressTask]:
        """Show a task while the block runs; `completed` of `total` were done by an earlier, interrupted attempt. folder: what it fills."""
        task = ProgressTask(self, description, total, completed, folder)
        if not self.console.is_terminal:
            yield task
            self._print_line(task)
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
            return
        now = time.monotonic()
        if now - task._printed >= self._every * min(_SELDOM, 1 + (now - task._begun) / _SOON_SECONDS):
            task._printed = now
            self._print_line(task)

    def _print_line(self, task: ProgressTask) -> None:
        """The task's line, unless it is what was printed last."""
        if task.line != task._last_line:
            task._last_line = task.line
            self.print(task.line)
