"""What a launcher has put into the environment of this process, and the key-value store of all processes of this start.

The store may be older than the processes: torchrun keeps one, and `--max-restarts` starts processes anew on it, among the keys of those that
died. So the first process gives every start a name of its own, which is in front of all keys; nothing in the environment tells one start
from the next on every node.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

from mmdpo_trainers.errors import StageError

CONNECT = timedelta(seconds=300)
"""How long the processes of a start wait for each other, once. Later waits have no limit."""

_LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")

_REMEDY = "start all of them with torchrun or accelerate launch, or take WORLD_SIZE out of the environment if one is meant"


class Place(NamedTuple):
    """Number of a process among those of its launch and of its machine, from 0, and how many the launch has."""

    rank: int
    local_rank: int | None
    size: int


def place() -> Place:
    """As the environment has it; where there is no launcher, as somebody's process group has it."""
    size = _number("WORLD_SIZE")
    if size is not None and size > 1:
        return Place(_number("RANK") or 0, _number("LOCAL_RANK"), size)
    group = process_group() if size is None else None
    if group is not None:
        return Place(int(group.get_rank()), _number("LOCAL_RANK"), int(group.get_world_size()))
    return Place(0, 0, 1)


def process_group() -> Any:
    """torch.distributed where somebody has made its process group, else None."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed is not None and distributed.is_available() and distributed.is_initialized() else None


def check_environment() -> None:
    """Raise StageError where the environment of several processes lacks something, or contradicts itself."""
    here = place()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise StageError(f"WORLD_SIZE is {here.size}, but {', '.join(missing)} is not set: {_REMEDY}")
    if not 0 <= here.rank < here.size or _number("RANK") is None:
        raise StageError(
            f"RANK: expected 0 to {here.size - 1}, as WORLD_SIZE is {here.size}, got {os.environ['RANK']!r}: {_REMEDY}"
        )


def own_gpu(here: Place) -> int:
    """Number of a process's GPU among those it sees. Raises StageError where it cannot be told which one that is."""
    import torch

    count = torch.cuda.device_count()
    if count == 1:
        # A launcher may show each process its own GPU only.
        return 0
    if here.local_rank is None:
        raise StageError(
            f"LOCAL_RANK is not set for process {here.rank} of {here.size}, which sees {count} GPUs and cannot tell which one is its own: "
            "start with torchrun or accelerate launch, or show each process one GPU with CUDA_VISIBLE_DEVICES"
        )
    if here.local_rank >= count:
        raise StageError(
            f"LOCAL_RANK: expected 0 to {count - 1}, as this process sees {count} GPUs, got {here.local_rank}; start as many processes on a "
            "machine as it has GPUs"
        )
    return here.local_rank


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """While it lasts, the environment is that of a process on its own; what is changed in it meanwhile does not last either."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(_LAUNCHERS) and name != "ACCELERATE_USE_CPU":
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def connect() -> Any:
    """The store of this start, once all of its processes are there. Raises StageError where they do not come."""
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    check_environment()
    here = place()
    try:
        store, _, _ = next(iter(rendezvous("env://", here.rank, here.size, timeout=CONNECT)))
        start = _named(store, here)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, StageError):
            raise
        came = re.search(r"(\d+)/\d+ clients joined", str(error))
        if here.rank == 0 and came:
            raise _not_all(int(came[1]), here.size) from error
        reason = " ".join(str(error).split())
        raise StageError(f"process {here.rank} of {here.size} cannot reach the first one: {reason}; {_REMEDY}") from error
    return PrefixStore(f"mmdpo/{start}", store)


def _named(store: Any, here: Place) -> str:
    """The name of this start. Each process greets the first one with a word that nobody has used before, and takes the name that is
    answered to that word; what a dead process wrote, greetings or answers, has other words in it."""
    if here.rank > 0:
        word = uuid.uuid4().hex
        store.set(f"mmdpo-hello/{here.rank}", word)
        if not _until(lambda: store.check([f"mmdpo-start/{word}"])):
            raise StageError(f"process {here.rank} of {here.size}: the first process did not answer within {_limit()}; {_REMEDY}")
        start: str = store.get(f"mmdpo-start/{word}").decode()
        store.add(f"mmdpo-came/{start}", 1)
        return start
    start = uuid.uuid4().hex
    answered: set[str] = set()
    waiting = [f"mmdpo-hello/{rank}" for rank in range(1, here.size)]

    def all_came() -> bool:
        for key in waiting:
            word = store.get(key).decode() if store.check([key]) else None
            # An old greeting is answered too, to nobody; the new one takes its place.
            if word is not None and word not in answered:
                store.set(f"mmdpo-start/{word}", start)
                answered.add(word)
        return int(store.add(f"mmdpo-came/{start}", 0)) == len(waiting)

    if not _until(all_came):
        raise _not_all(1 + int(store.add(f"mmdpo-came/{start}", 0)), here.size)
    return start


def _not_all(came: int, size: int) -> StageError:
    return StageError(f"only {came} of {size} processes came within {_limit()}; {_REMEDY}")


def _limit() -> str:
    return f"{CONNECT.total_seconds():.0f} s"


def _until(ready: Callable[[], bool]) -> bool:
    end, pause = time.monotonic() + CONNECT.total_seconds(), 0.005
    while not ready():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(0.2, pause * 1.5)
    return True


def _number(name: str) -> int | None:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else None
