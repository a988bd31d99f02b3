"""Several processes of one launch, with what a launcher puts into their environment."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from processes import HANGS, end_of, free_port, start

from mmdpo_trainers.errors import MmdpoError
from mmdpo_trainers.processes import parts as shards
from mmdpo_trainers.processes import ranks
from mmdpo_trainers.processes.progress import Progress

IDS = [str(number) for number in range(12)]


def launch(processes: int, work: Callable[[int], object], port: int | None = None, **environment: str) -> list[int]:
    """Run `work(rank)` in each; returns exit codes, 2 for a MmdpoError. Like a launcher, it ends the others once one was killed.

    work: found by name, or a partial of such a function. port: of their store; None: a free one. environment: on top of what
    a launcher has in it.
    """
    with free_port() as free:
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free if port is None else port)}
        own = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment} for rank in range(processes)]
        started = [start(_enter, rank, work, environment=each) for rank, each in enumerate(own)]
        return end_of(started, lambda code: code == -signal.SIGKILL)


def _enter(rank: int, work: Callable[[int], object]) -> None:
    torch.set_num_threads(1)
    # However busy the machine is, the others hear of a failure.
    ranks._LINGER = HANGS
    try:
        with ranks.failing():
            work(rank)
        ranks.finish()
    except MmdpoError as error:
        print(f"[{rank}] {error}", file=sys.stderr)
        sys.exit(2)


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
