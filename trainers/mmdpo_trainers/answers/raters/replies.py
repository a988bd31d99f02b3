"""Every reply of a judge, kept as it comes: a question that was answered is not asked again, by this run or by a continued one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mmdpo_trainers.files.json_lines import JsonLines
from mmdpo_trainers.processes import ranks

_FILE = "replies.jsonl"

NO_REPLY = "no_reply"
"""Reason of a reply that never came."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came of one question."""

    text: str | None
    """None: there is no reply, and `problem` says why."""
    problem: str | None = None
    reason: str | None = None
    """The problem as a word to count by."""
    cut: bool = False
    """Whether the reply ended at the longest that was allowed."""
    requests: int = 1
    """Times it was asked until this came."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Tokens, as far as the endpoint tells."""


class KeptReplies:
    """Replies by the hash of their question, in memory and in an append-only file: `replies.jsonl`, or that with a process's number.

    folder: the stage's; what other processes write there is known after `refresh`. earlier: files of other runs or stages, whose replies are
    taken over where their question is asked. Threads may add at the same time.
    """

    def __init__(self, folder: Path, earlier: Sequence[Path] = ()) -> None:
        rank = ranks.rank()
        self._folder, self._lock = folder, threading.Lock()
        self._lines = JsonLines(folder / (f"replies-{rank:05}.jsonl" if rank else _FILE), key="key")
        self._replies: dict[str, Reply] = {}
        self._read: dict[Path, int] = {}
        self._earlier = {key: (id, reply) for path in earlier for key, id, reply, _ in _lines_of(path)}
        self.refresh()

    def refresh(self) -> None:
        """Take in what came to the files since the last time."""
        for path in reply_files(self._folder):
            for key, _, reply, end in _lines_of(path, self._read.get(path, 0)):
                self._replies[key], self._read[path] = reply, end

    def find(self, key: str) -> Reply | None:
        """The reply to a question that was asked before, by this run or the earlier one."""
        found = self._replies.get(key)
        if found is None and key in self._earlier:
            id, earlier = self._earlier[key]
            # What it took, the earlier run has paid.
            found = replace(earlier, requests=0, prompt_tokens=0, completion_tokens=0)
            self.add(key, id, found)
        return found

    def add(self, key: str, id: str, reply: Reply) -> None:
        """Keep the reply to a question about a record; it is on disk when this returns. No reply at all is kept in memory alone."""
        with self._lock:
            if reply.reason != NO_REPLY:
                self._lines.append([{"key": key, "id": id, **asdict(reply)}])
            self._replies[key] = reply

    def close(self) -> None:
        self._lines.close()


def reply_files(folder: Path) -> list[Path]:
    """The files of replies in a stage's folder, of all processes."""
    return sorted([*folder.glob(_FILE), *folder.glob("replies-*.jsonl")])


def costs(folder: Path) -> dict[str, int]:
    """What a judge's replies in a stage's folder took: `replies`, `requests`, of which `repeated`, and tokens as far as they were told."""
    replies = [reply for path in reply_files(folder) for _, _, reply, _ in _lines_of(path)]
    if not replies:
        return {}
    requests = sum(reply.requests for reply in replies)
    found = {"replies": len(replies), "requests": requests, "repeated": sum(max(0, reply.requests - 1) for reply in replies)}
    for name in ("prompt_tokens", "completion_tokens"):
        if tokens := sum(getattr(reply, name) for reply in replies):
            found[name] = tokens
    return found


def _lines_of(path: Path, start: int = 0) -> Iterator[tuple[str, str, Reply, int]]:
    """Key, id, reply and last byte of each whole line from a byte on: another process may be writing the last one."""
    names = {field.name for field in fields(Reply)}
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            record: dict[str, Any] = json.loads(line)
            reply = Reply(**{name: value for name, value in record.items() if name in names})
            yield str(record["key"]), str(record["id"]), reply, start
