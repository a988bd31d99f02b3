"""Pieces of work on the CPU spread over processes that are forked for it, their results in the order of the pieces."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_MOST = 16


def spread(work: Callable[[T], R], pieces: Sequence[T], *, processes: int | None = None) -> Iterator[R]:
    """`work(piece)` for each piece, in their order: `map(work, pieces)` on several cores.

    Each process takes every so many-th piece and waits until its last result was taken, so that there are never many. Their memory is this
    process's, as it is at the start; they end with it, however that ends. `work` must not touch a GPU. processes: at most so many; None:
    one a core. An error of `work` is raised here.
    """
    count = min(len(pieces), _MOST, len(os.sched_getaffinity(0)) if processes is None else processes)
    if count < 2:
        yield from map(work, pieces)
        return
    context = multiprocessing.get_context("fork")
    readers: list[Connection] = []
    children = []
    try:
        for number in range(count):
            reader, writer = context.Pipe(duplex=False)
            readers.append(reader)
            child = context.Process(target=_work, args=(work, pieces[number::count], writer, list(readers)), daemon=True)
            with warnings.catch_warnings():
                # They take no lock that another thread may hold.
                warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
                child.start()
            children.append(child)
            writer.close()
        for place in range(len(pieces)):
            yield _result(readers[place % count])
    finally:
        for reader in readers:
            reader.close()
        for child in children:
            child.terminate()
            child.join()


def _work(work: Callable[[T], R], pieces: Sequence[T], writer: Connection, readers: Sequence[Connection]) -> None:
    # An end that stays open here would keep this process waiting for a reader that is gone.
    for reader in readers:
        reader.close()
    # What is here already is not looked through for garbage, which would copy it.
    gc.freeze()
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        for piece in pieces:
            try:
                writer.send(("result", work(piece)))
            except BrokenPipeError:
                raise
            except Exception as error:
                writer.send(_told(error))
                return


def _told(error: Exception) -> tuple[str, Any]:
    try:
        # As the connection will do it.
        ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:
        return "error", RuntimeError("".join(traceback.format_exception(error)))
    return "error", error


def _result(reader: Connection) -> Any:
    try:
        kind, value = reader.recv()
    except EOFError as error:
        raise RuntimeError("a process that was forked to share the work was ended from outside; start again") from error
    if kind == "error":
        raise value
    return value
