"""JSON-lines files that survive a kill: read with errors that name file and line, appended to in whole lines."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mmdpo_trainers.errors import RunFolderError
from mmdpo_trainers.files.atomic import writing


def is_stage_file(path: str | os.PathLike[str]) -> bool:
    """Whether a stage of a run wrote the file: beside its files it keeps its state. Any other file is the user's own."""
    return (Path(path).parent / "state.json").is_file()


def _mend(path: Path) -> str:
    if is_stage_file(path):
        return "put the file back as it was, or write it anew: --restart with the stage that wrote it"
    return "mend this line of your file, or take it out"


Part = tuple[int, int]
"""First byte of some whole lines of a file, and the byte behind them."""


def read_jsonl(path: str | os.PathLike[str], part: Part | None = None) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file, or of a part of it; blank lines are passed over.

    Raises RunFolderError naming file and line (of a part counted from its first one) where a line is not a JSON object, or where the file
    is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise RunFolderError(f"{path} does not exist: run the stage that writes it first, or give your own file with --input")
    with path.open("rb") as file:
        place, end = part or (0, math.inf)
        file.seek(place)
        for number, line in enumerate(file, start=1):
            place += len(line)
            if line.strip():
                try:
                    record = json.loads(line)
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    raise RunFolderError(f"{path}, line {number}: not valid JSON ({error}); {_mend(path)}") from error
                if not isinstance(record, dict):
                    raise RunFolderError(
                        f"{path}, line {number}: expected a JSON object, got {type(record).__name__}; {_mend(path)}"
                    )
                yield record
            if place >= end:
                return


def line_parts(path: Path, size: int) -> list[Part]:
    """A file in parts of whole lines, each of about `size` bytes."""
    total, starts = path.stat().st_size, [0]
    with path.open("rb") as file:
        while starts[-1] + size < total:
            file.seek(starts[-1] + size)
            file.readline()
            starts.append(file.tell())
    starts = [start for start in starts if start < total] or [0]
    return list(zip(starts, [*starts[1:], total], strict=True))


def line_places(path: Path) -> Iterator[tuple[str, int, int]]:
    """(id, first byte, bytes) of each whole line of a file that `JsonLines` wrote."""
    start = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield str(json.loads(line)["id"]), start, len(line)
            start += len(line)


class JsonLines:
    """A JSON-lines file that is appended to and continued after a kill.

    Opening truncates a torn last line (one that was not wholly written). Each `append` writes whole lines, then flushes to disk.

    >>> with JsonLines(folder / "responses.jsonl") as out:
    ...     done = out.done_ids()
    ...     for batch in batches_without(done):
    ...         out.append(answers(batch))
    """

    def __init__(self, path: str | os.PathLike[str], *, key: str = "id") -> None:
        self.path = Path(path)
        self.key = key
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._done = self._repair()
        # Without a buffer, which would be written again, and fail again, when the file is closed.
        self._file = self.path.open("ab", buffering=0)

    def _repair(self) -> set[str]:
        done: set[str] = set()
        if not self.path.exists():
            return done
        whole = 0
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for number, line in enumerate(file, start=1):
                try:
                    record = json.loads(line)
                    if not isinstance(record, dict) or self.key not in record or not line.endswith(b"\n"):
                        raise ValueError(f"expected an object with {self.key!r}, got {line[:40]!r}")
                except ValueError as error:
                    if whole + len(line) < size:
                        raise RunFolderError(
                            f"{self.path}, line {number}: not a line that was written here ({error}). Take this line out of the file: "
                            "what is missing is then made again"
                        ) from error
                    break
                whole += len(line)
                done.add(str(record.get(self.key)))
        if whole < size:
            os.truncate(self.path, whole)
        return done

    def done_ids(self) -> set[str]:
        """The keys of all records in the file, those of this process included."""
        return set(self._done)

    def __contains__(self, key: str) -> bool:
        return key in self._done

    def __len__(self) -> int:
        return len(self._done)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records as whole lines, in one write, and wait until they are on disk."""
        records = list(records)
        if not records:
            return
        data = memoryview("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
        end = os.fstat(self._file.fileno()).st_size
        with writing(self.path, f"Its {len(self)} records so far are kept"):
            try:
                while data:
                    data = data[self._file.write(data) :]
                os.fsync(self._file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file.fileno(), end)
                raise
        self._done.update(str(record.get(self.key)) for record in records)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
