"""Processes that tests start: forks of a server that has imported what they need and never had a second thread.

A fork of the test's own process has its memory but none of its other threads, so that a lock which one of them held stays locked for ever.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

HANGS = 600
"""Seconds after which a process is taken for one that hangs; nothing is shown by ending sooner."""

_PRELOADED = ("distributed", "launches", "prompt_records", "mmdpo_trainers.cli.main", "mmdpo_trainers.run.pipeline", "frozen")
# Imports that would start threads: of OpenMP and OpenBLAS, and of pyarrow's allocator.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}


class Started(NamedTuple):
    """A process, and the files of what it writes to its standard output and error."""

    process: BaseProcess
    output: Path
    error: Path


def context() -> ForkServerContext:
    """The server's, for what takes a context of multiprocessing."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(list(_PRELOADED))
    own = {**_ONE_THREAD, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with mock.patch.dict(os.environ, own):
        forkserver.ensure_running()
    return found


def start(work: Callable[..., object], *args: Any, environment: Mapping[str, str] | None = None) -> Started:
    """Start `work(*args)` in a process with this one's environment and `environment`. Both must be found by name, as for pickle.

    What this process has changed in its modules is not changed in that one.
    """
    folder = Path(tempfile.mkdtemp())
    files = folder / "output", folder / "error"
    for path in files:
        path.touch()
    process = context().Process(target=_enter, args=({**os.environ, **(environment or {})}, files, work, args))
    process.start()
    return Started(process, *files)


def end_of(started: Sequence[Started], failed: Callable[[int], bool] = bool) -> list[int]:
    """Wait for the processes and return their exit codes. Like a launcher, end the others once one has ended with a `failed` code.

    What they wrote is written again by this process, where pytest sees it.
    """
    running = [each.process for each in started]
    try:
        while running and not any(failed(int(each.process.exitcode or 0)) for each in started):
            ready = wait([process.sentinel for process in running], HANGS)
            assert ready, f"a process did not end: {[each.error.read_text()[-3000:] for each in started]}"
            running = [process for process in running if process.is_alive()]
    finally:
        for process in running:
            process.kill()
            process.join()
        for each in started:
            sys.stdout.write(each.output.read_text(errors="replace"))
            sys.stderr.write(each.error.read_text(errors="replace"))
            shutil.rmtree(each.output.parent)
    return [int(each.process.exitcode or 0) for each in started]


def killed(work: Callable[..., object], *args: Any) -> None:
    """Run `work` in another process, which must end by SIGKILL."""
    assert end_of([start(work, *args)]) == [-signal.SIGKILL]


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A port that nobody else is given while it lasts, and that a server may listen on meanwhile."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        yield int(probe.getsockname()[1])


def _enter(environment: Mapping[str, str], files: Sequence[Path], work: Callable[..., object], args: Sequence[Any]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(files, start=1):
        with path.open("a") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    work(*args)
