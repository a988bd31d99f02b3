"""The processes of one launch (torchrun, accelerate, SLURM through torchrun): who this one is, and how they wait for each other.

They wait on a key-value store, the one the launcher keeps, or else the first process, by looking now and then: a stage that only the
first process does may take hours, which a collective of a process group would give up on after minutes, and the wait sees a failure
of another process. No process group is needed for that.

With one process everything here is trivial and torch.distributed is not imported.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from mmdpo_trainers.errors import StageError
from mmdpo_trainers.processes import launcher

T = TypeVar("T")

_PART = 2**22
"""Bytes of a value; a store takes no value of more than 8 MiB."""
_LINGER = 3.0
"""Seconds in which the others may read the message of a process that failed, whose store ends with it if it is the first."""


class Failure(NamedTuple):
    """The first failure of a launch."""

    rank: int
    message: str


class _State:
    """What this process knows about the launch."""

    store: Any = None
    # Fixed once the processes are connected, whatever becomes of the environment or of process groups.
    place: launcher.Place | None = None
    told: bool = False
    # How often each kind of meeting took place; processes meet in the same order, so equal numbers are the same meeting.
    meetings: Counter[str] = Counter()
    counts: Counter[str] = Counter()


def _place() -> launcher.Place:
    return _State.place or launcher.place()


def rank() -> int:
    """Number of this process among all of the launch, from 0."""
    return _place().rank


def world_size() -> int:
    """Number of processes of the launch; 1 without a launcher."""
    return _place().size


def local_rank() -> int:
    """Number of this process among those of its machine, from 0."""
    return _place().local_rank or 0


def is_rank_0() -> bool:
    """Whether this is the process that does what one process has to do."""
    return rank() == 0


def is_distributed() -> bool:
    """Whether there is more than one process."""
    return world_size() > 1


def device() -> str:
    """The device of this process where none is asked for: `cuda:<local rank>`, or `auto` where it is alone or has no GPU."""
    if not is_distributed():
        return "auto"
    import torch

    return f"cuda:{launcher.own_gpu(_place())}" if torch.cuda.is_available() else "auto"


def start() -> None:
    """Connect the processes of the launch, once; called before anything that needs them."""
    if is_distributed() and _State.store is None:
        _State.store = launcher.connect()
        _State.place = launcher.place()
        atexit.register(finish)


def barrier() -> None:
    """Wait until every process is here, however long that takes. Raises StageError where another one failed meanwhile."""
    if is_distributed():
        key = meeting("barrier")
        count(key, 1)
        wait_for(lambda: count(key, 0) >= world_size())


def on_rank_0(work: Callable[[], T]) -> T:
    """Let the first process do `work` while the others wait, however long; all return what it returned, sent as JSON."""
    if not is_distributed():
        return work()
    key = meeting("result")
    if is_rank_0():
        with failing():
            result = work()
        text = json.dumps(result).encode()
        parts = [text[start : start + _PART] for start in range(0, len(text), _PART)]
        for number, part in enumerate(parts):
            _put(f"{key}/{number}", part)
        _put(key, str(len(parts)))
        return result
    wait_for(lambda: _asked(lambda store: store.check([key])))
    parts = [_get(f"{key}/{number}") for number in range(int(_get(key)))]
    return json.loads(b"".join(parts))  # type: ignore[no-any-return]


def count(name: str, add: int) -> int:
    """Add to a number that all processes share, and return it."""
    if is_distributed():
        return int(_asked(lambda store: store.add(f"count/{name}", add)))
    _State.counts[name] += add
    return _State.counts[name]


def wait_for(ready: Callable[[], bool]) -> None:
    """Look until `ready()`, ever more seldom up to twice a second. Raises StageError where another process failed."""
    pause = 0.005
    while not ready():
        check()
        time.sleep(pause)
        pause = min(0.5, pause * 1.5)


def check() -> None:
    """Raise StageError where another process has failed; to be called now and then in long work."""
    failure = first_failure()
    if failure is not None and failure.rank != rank():
        raise StageError(f"process {failure.rank} of {world_size()} failed, and this one ends with it: {failure.message}")


def first_failure() -> Failure | None:
    """What `fail` was told first, by any process; None where none has failed."""
    if not is_distributed() or not _asked(lambda store: store.check(["failure"])):
        return None
    number, message = json.loads(_asked(lambda store: store.get("failure")))
    return Failure(number, message)


def fail(error: BaseException | str) -> Failure:
    """Tell the other processes that this one ends, and why; returns the first failure, which may be another's."""
    text = error if isinstance(error, str) else str(error) or type(error).__name__
    own = Failure(rank(), " ".join(text.split()))
    if not is_distributed() or _State.store is None:
        return own
    try:
        first = Failure(*json.loads(_State.store.compare_set("failure", "", json.dumps(own))))
        if not _State.told:
            # Once, though an error goes through several blocks that tell of it.
            _State.told = True
            if first == own:
                _linger("heard", world_size() - 1)
            else:
                _State.store.add("heard", 1)
    except (RuntimeError, ValueError):
        return own
    return first


@contextlib.contextmanager
def failing() -> Iterator[None]:
    """Tell the others of an error that leaves the block."""
    try:
        yield
    except BaseException as error:
        fail(error)
        raise


def meeting(kind: str) -> str:
    """A name that all processes give to what they do together now, and to nothing else."""
    start()
    _State.meetings[kind] += 1
    return f"{kind}/{_State.meetings[kind]}"


def _asked(question: Callable[[Any], T]) -> T:
    start()
    try:
        return question(_State.store)
    except RuntimeError as error:
        raise StageError(
            f"process {rank()} of {world_size()} lost the launcher or the first process ({' '.join(str(error).split())[:200]}); what "
            "is done is kept: start all processes again"
        ) from error


def _put(key: str, value: str | bytes) -> None:
    _asked(lambda store: store.set(key, value))


def _get(key: str) -> bytes:
    return _asked(lambda store: bytes(store.get(key)))


def _linger(name: str, wanted: int) -> None:
    end = time.monotonic() + _LINGER
    while _State.store.add(name, 0) < wanted and time.monotonic() < end:
        time.sleep(0.02)


def finish() -> None:
    """Leave the launch, as happens at exit by itself. The first process, which may keep the store, leaves last."""
    if _State.store is None:
        return
    with contextlib.suppress(RuntimeError):
        _State.store.add("finished", 1)
        if is_rank_0() and not _State.store.check(["failure"]):
            _linger("finished", world_size())
