"""The reference model's log-probabilities in a file beside the data, by content of the records."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mmdpo_trainers.errors import RunFolderError, StaleCacheError
from mmdpo_trainers.files.fingerprint import Fingerprint
from mmdpo_trainers.files.locks import appending

logger = logging.getLogger(__name__)

_OPENING = b'{"reference_cache": '

Logps = dict[str, float]
"""Branch -> summed log-probability of its response."""


class ReferenceCache:
    """Log-probabilities of the reference by content key, in a JSON-lines file.

    The first line is the header: what the numbers depend on beside the records (see `reference_header`). Every other line is one
    record, `{"key": …, "logps": {branch: number}}`; numbers come back exactly. A key covers all that the reference saw of its
    record, so a record that was changed has another one and is missing here. Whole lines are appended under a lock and flushed to
    disk: a kill at any byte loses what was being written and nothing else, and several processes may share the file. The first
    number written for a key stays.

    Args:
        path: the file; made by the first `add`.
        header: JSON-able.

    Raises StaleCacheError naming what changed where the file has another header; RunFolderError where it is no such file.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.header: dict[str, Any] = json.loads(json.dumps(dict(header)))
        self._logps: dict[str, Logps] = {}
        self._file: BinaryIO | None = None
        """Kept open: as long as it is, no other file can get its inode number."""
        self._end = 0
        """Where the part of the file that was read ends."""
        self.follow()

    def __len__(self) -> int:
        return len(self._logps)

    def __contains__(self, key: str) -> bool:
        return key in self._logps

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those keys that are not in the cache, each once, in order."""
        return [key for key in dict.fromkeys(keys) if key not in self._logps]

    def get(self, key: str) -> Logps:
        """Branch -> log-probability. Raises KeyError where the key is not in the cache."""
        if key not in self._logps:
            raise KeyError(f"{self.path} holds no record with key {key}; its content changed since the reference was run over it")
        return self._logps[key]

    def add(self, logps: Mapping[str, Logps]) -> None:
        """Append records and wait until they are on disk; keys that the file holds by now keep what they have.

        Raises ValueError naming key and branch of a value that is not finite; StaleCacheError where another process has put a
        cache with another header in place of this one.
        """
        for key, branches in logps.items():
            for branch, value in branches.items():
                if not math.isfinite(value):
                    raise ValueError(f"logps: expected finite numbers, got {value} for {branch} of key {key}")
        with self._locked() as file:
            os.ftruncate(file.fileno(), self._end)
            fresh = {key: dict(logps[key]) for key in self.missing(logps)}
            lines: list[dict[str, Any]] = [] if self._end else [{"reference_cache": self.header}]
            lines += [{"key": key, "logps": values} for key, values in fresh.items()]
            data = "".join(json.dumps(line) + "\n" for line in lines).encode()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            self._end += len(data)
            self._logps.update(fresh)

    def follow(self) -> None:
        """Read what other processes appended."""
        if self.path.exists():
            self._follow(self.path.open("rb"))

    def part(self, rank: int) -> ReferenceCache:
        """The file in which one of several processes keeps what it computes until `merge`."""
        return ReferenceCache(self.path.with_name(f"{self.path.name}.part-{rank}"), self.header)

    def merge(self) -> None:
        """Append what parts hold and remove them, those of a pass that was killed included, and what another launch has so far."""
        for path in sorted(self.path.parent.glob(f"{self.path.name}.part-*")):
            try:
                part = ReferenceCache(path, self.header)
                # Until it is gone nobody appends to it: who holds it open begins it anew.
                with part._locked():
                    self.add(part._logps)
                    path.unlink()
            except StaleCacheError:
                logger.warning("%s: removed, it is of another reference", path)
                path.unlink()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The file, for appending by this process alone, with all that others appended read."""
        with appending(self.path) as file:
            self._follow(file)
            yield file

    def _follow(self, file: BinaryIO) -> None:
        """Read on where reading ended; from the start where the file is another one than before."""
        stat = os.fstat(file.fileno())
        if self._file is None or not os.path.samestat(os.fstat(self._file.fileno()), stat):
            self._end, self._logps = 0, {}
        if self._file is not None:
            self._file.close()
        self._file = file
        file.seek(self._end)
        for line in file:
            entry = self._parse(line, is_last=self._end + len(line) >= stat.st_size)
            if entry is None:
                break
            if self._end == 0:
                self._check_header(entry)
            else:
                self._logps.setdefault(str(entry["key"]), entry["logps"])
            self._end += len(line)

    def _parse(self, line: bytes, *, is_last: bool) -> dict[str, Any] | None:
        """One line; None: it was not wholly written."""
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except (json.JSONDecodeError, UnicodeDecodeError):
            entry = None
        if entry is None and is_last:
            return None
        expected = "reference_cache" if self._end == 0 else "logps"
        if not isinstance(entry, dict) or expected not in entry:
            raise RunFolderError(
                f"{self.path}, byte {self._end}: expected a line of cached reference log-probabilities, got {line[:60]!r}; delete the "
                "file to have it computed anew, or give reference_cache another path"
            )
        return entry

    def _check_header(self, entry: Mapping[str, Any]) -> None:
        changes = Fingerprint(self.header).differences(entry["reference_cache"])
        if changes:
            raise StaleCacheError(
                f"{self.path} was computed with another reference ({'; '.join(changes)}), so its log-probabilities do not hold. Run "
                "`mmdpo reference --refresh`, or delete the file, to compute them anew; or give reference_cache another path"
            )


def remove_cache(path: str | os.PathLike[str]) -> None:
    """Delete a cache, where there is one. Raises RunFolderError where the file is something else."""
    path = Path(path)
    if not path.exists():
        return
    with path.open("rb") as file:
        found = file.read(len(_OPENING))
    if found != _OPENING[: len(found)]:
        raise RunFolderError(f"{path} is no cache of reference log-probabilities and stays; give reference_cache another path")
    path.unlink()
