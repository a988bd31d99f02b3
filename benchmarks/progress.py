"""What is being done: a bar and tables on a terminal where rich is installed, plain lines and Markdown elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from benchmarks.measure import markdown

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError:  # a machine with torch and little else
    Console = None  # type: ignore[assignment,misc]


class Steps(Protocol):
    """What a piece of work reports to."""

    def say(self, line: str) -> None:
        """What is being done now."""

    def step(self, line: str) -> None:
        """One step is done; `line` stays on the screen."""


class _Plain:
    def say(self, line: str) -> None:
        print(line, flush=True)

    step = say


class _Rich:
    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task

    def say(self, line: str) -> None:
        self._progress.update(self._task, description=line)

    def step(self, line: str) -> None:
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self._progress.advance(self._task)


@contextmanager
def steps(total: int) -> Iterator[Steps]:
    """Reports of `total` steps."""
    if not _on_a_terminal():
        yield _Plain()
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(), transient=True) as progress:
        yield _Rich(progress, progress.add_task("", total=total))


def show_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table."""
    if not _on_a_terminal():
        print(f"\n{title}\n\n{markdown(header, rows)}", flush=True)
        return
    table = Table(title=title, title_justify="left")
    for column in header:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _on_a_terminal() -> bool:
    return Console is not None and sys.stdout.isatty()
