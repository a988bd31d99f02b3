"""Answers that have come one by one and are in no stage's file yet, so that a kill in the middle of a batch loses none."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdpo_trainers.files.json_lines import JsonLines
from mmdpo_trainers.processes import ranks

_FILES = "came-*.jsonl"


class KeptAnswers:
    """By record's id, in memory and in an append-only file a process; what any process of an earlier launch kept is known too.

    Threads may add at the same time.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"came-{ranks.rank():05}.jsonl"
        self._answers: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.glob(_FILES)):
            self._answers |= _whole_lines(path)
        self._lock, self._lines = threading.Lock(), JsonLines(self._path)

    def __contains__(self, id: str) -> bool:
        return id in self._answers

    def add(self, id: str, answer: Mapping[str, Any]) -> None:
        """Keep an answer; it is on disk when this returns."""
        with self._lock:
            self._lines.append([{"id": id, **answer}])
            self._answers[id] = dict(answer)

    def take(self, id: str) -> dict[str, Any]:
        """The answer, for the stage's file; it is kept on disk until `settle`."""
        return self._answers.pop(id)

    def settle(self) -> None:
        """What was taken is in the stage's file: begin a new file, where nothing else is in this one."""
        if len(self._lines) and not self._answers.keys() & self._lines.done_ids():
            self._lines.close()
            self._path.unlink()
            self._lines = JsonLines(self._path)

    def close(self) -> None:
        self._lines.close()


def forget(folder: Path) -> None:
    """Take away what was kept: the stage's file has all of it."""
    for path in folder.glob(_FILES):
        path.unlink()


def _whole_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Answers by id. Another process may be writing the last line."""
    found = {}
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                record = json.loads(line)
                found[record.pop("id")] = record
    return found
