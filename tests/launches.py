"""Several processes of one launch, forked from the test, with what a launcher puts into their environment."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from mmdpo_trainers import ranks, shards
from mmdpo_trainers.errors import MmdpoError
from mmdpo_trainers.progress import Progress

IDS = [str(number) for number in range(12)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(processes: int, work: Callable[[int], None], seconds: float = 60, port: int | None = None) -> list[int]:
    """Run `work(rank)` in each; returns exit codes, 2 for a MmdpoError. Like a launcher, it ends the others once one was killed.

    port: of their store; None: a free one.
    """
    port = free_port() if port is None else port
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_enter, args=(rank, processes, port, work)) for rank in range(processes)]
    for process in started:
        process.start()
    waiting = list(started)
    while waiting:
        ready = wait([process.sentinel for process in waiting], seconds)
        if not ready or any(process.exitcode == -signal.SIGKILL for process in started):
            for process in waiting:
                process.kill()
        assert ready, "a process did not end"
        waiting = [process for process in waiting if process.is_alive()]
    return [int(process.exitcode or 0) for process in started]


def _enter(rank: int, processes: int, port: int, work: Callable[[int], None]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    code = 0
    try:
        with ranks.failing():
            work(rank)
        ranks.finish()
    except MmdpoError as error:
        print(f"[{rank}] {error}", file=sys.stderr)
        code = 2
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def write_all(path: Path, die_at: int | None = None) -> None:
    """A record a batch; the process with RANK 1 is killed before its batch `die_at`."""
    batches = 0

    def write(number: int, ids: Any) -> list[dict[str, str]]:
        nonlocal batches
        if ranks.rank() == 1 and batches == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        batches += 1
        return [{"id": id} for id in ids]

    with ranks.failing():
        shards.write_shards(path, [[id] for id in IDS], write, Progress(), "write")
