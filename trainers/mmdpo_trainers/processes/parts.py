"""Batches dealt to the processes of a launch: a part file each, one file in the end, the same as one process writes.

Which batches are missing follows from what the files hold, not from who wrote it, so that any number of processes continues what any
other number began.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmdpo_trainers.errors import StageError
from mmdpo_trainers.files.atomic import writing
from mmdpo_trainers.files.json_lines import JsonLines, line_places
from mmdpo_trainers.files.locks import take
from mmdpo_trainers.processes import ranks
from mmdpo_trainers.processes.progress import Progress

Batches = Sequence[Sequence[str]]
Write = Callable[[int, Sequence[str]], Sequence[Mapping[str, Any]]]
"""(batch number, ids that are missing) -> the lines of these ids."""

_VISIBLE = 15.0
"""Seconds in which a file that another machine has written has to show in a folder that both have."""


class _Place(NamedTuple):
    file: Path
    start: int
    size: int


def part_files(path: Path) -> list[Path]:
    """The part files beside a file, left by processes that were ended or still at work."""
    return sorted(path.parent.glob(f"{path.stem}.part-*{path.suffix}"))


def part_file(path: Path, rank: int) -> Path:
    """Where a process puts its lines."""
    return path.with_name(f"{path.stem}.part-{rank:05}{path.suffix}")


def write_shards(path: Path, batches: Batches, write: Write, progress: Progress, description: str) -> None:
    """Have every batch that is missing written by one of the processes, then put all lines into `path`, in the order of the batches."""
    total = sum(map(len, batches))
    missing = ranks.on_rank_0(lambda: _missing(path, batches))
    # Not by its path, which another machine may have under another name.
    counter = ranks.meeting("written")
    own = missing[ranks.rank() :: ranks.world_size()]
    completed = total - sum(len(places) for _, places in missing)
    with _task(progress, description, total, completed, path.parent) as task, ranks.failing():

        def seen() -> None:
            if task is not None:
                task.advance(ranks.count(counter, 0) + completed - task.completed)

        # Without a batch there is no part file: the first process, which takes parts away, may be at that already.
        if own:
            with _alone(part_file(path, ranks.rank())) as part, JsonLines(part) as out:
                for number, places in own:
                    ids = [batches[number][place] for place in places]
                    ranks.check()
                    out.append(write(number, ids))
                    ranks.count(counter, len(ids))
                    seen()

        def all_written() -> bool:
            seen()
            return ranks.count(counter, 0) >= total - completed

        ranks.wait_for(all_written)
        ranks.on_rank_0(lambda: merge_parts(path, batches))


def _missing(path: Path, batches: Batches) -> list[tuple[int, list[int]]]:
    """(number of a batch, places in it) of what is in no file yet. Torn last lines are cut off."""
    done: set[str] = set()
    for file in [path, *part_files(path)]:
        with contextlib.nullcontext(file) if file == path else _alone(file), JsonLines(file) as lines:
            done |= lines.done_ids()
    found = ((number, [place for place, id in enumerate(ids) if id not in done]) for number, ids in enumerate(batches))
    return [(number, places) for number, places in found if places]


def merge_parts(path: Path, batches: Batches) -> None:
    """All lines into one file, which takes the place of the old one at once; then the parts go."""
    parts, places = _all_lines(path, batches)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with (
            writing(path, "All lines are in the part files beside it"),
            contextlib.ExitStack() as stack,
            os.fdopen(descriptor, "wb") as out,
        ):
            opened = {file: stack.enter_context(file.open("rb")) for file in [path, *parts]}
            for key in (key for ids in batches for key in ids):
                place = places[key]
                opened[place.file].seek(place.start)
                out.write(opened[place.file].read(place.size))
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    for part in parts:
        part.unlink()


def _all_lines(path: Path, batches: Batches) -> tuple[list[Path], dict[str, _Place]]:
    """The part files, and where the line of each id is. Raises StageError where lines that were written do not show."""
    end, pause = time.monotonic() + _VISIBLE, 0.05
    while True:
        places: dict[str, _Place] = {}
        parts = part_files(path)
        for file in [path, *parts]:
            for key, start, size in line_places(file):
                places.setdefault(key, _Place(file, start, size))
        missing = sum(key not in places for ids in batches for key in ids)
        if not missing:
            return parts, places
        if time.monotonic() > end:
            raise StageError(
                f"{path}: {missing} of {sum(map(len, batches))} lines are neither in it nor in the part files beside it, although all were "
                "written: expected the run folder to be one folder for all processes. Put it on a file system that all machines share, "
                "under an absolute path, and start again"
            )
        time.sleep(pause)
        pause = min(1.0, pause * 2)


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[Path]:
    """Hold a part file. A process of a killed launch may still be at work on it; the kernel drops the hold of a dead one."""
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as file:
        take(
            file,
            lambda: (
                f"{part} is being written by another process, which an earlier launch may have left; end it, then start again"
            ),
        )
        yield part


@contextlib.contextmanager
def _task(progress: Progress, description: str, total: int, completed: int, folder: Path) -> Iterator[Any]:
    """The first process shows the work of all."""
    if not ranks.is_rank_0():
        yield None
        return
    with progress.task(description, total, completed, folder) as task:
        yield task
