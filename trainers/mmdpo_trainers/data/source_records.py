"""The usable records of a source, of which there may be millions: on disk, read one by one."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from mmdpo_trainers.data.sources import SourceRecord
from mmdpo_trainers.files.spool import Spool

_Stored = tuple[str, str, str, str, tuple[str, ...] | None, int]


class SourceRecords:
    """Records by their number. In memory are the paths of their pictures, each once, and some bytes a record."""

    def __init__(self, folder: Path) -> None:
        self._spool: Spool[_Stored] = Spool(str(folder))
        self._places = array("Q")
        self.pictures: dict[str, str] = {}
        """Path of a picture -> the first of its records' ids, in the order of texts."""

    def add(self, record: SourceRecord) -> None:
        path = str(record.picture)
        self._places.append(len(self._spool))
        self._spool.append((record.id, path, record.question, record.answer, record.options, record.row))
        if record.id < self.pictures.setdefault(path, record.id):
            self.pictures[path] = record.id

    def keep(self, wanted: Callable[[str], bool]) -> None:
        """Leave out the records of pictures (paths) that are not wanted."""
        self.pictures = {path: id for path, id in self.pictures.items() if wanted(path)}
        self._places = array("Q", (place for place in self._places if self._spool[place][1] in self.pictures))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> SourceRecord:
        id, path, question, answer, options, row = self._spool[self._places[index]]
        return SourceRecord(id, Path(path), question, answer, options, row)

    def ids(self) -> Iterator[str]:
        return (self._spool[place][0] for place in self._places)

    def close(self) -> None:
        self._spool.close()


def shuffled(ids: Iterator[str], before: Sequence[object], after: Sequence[object]) -> np.ndarray:
    """Indices of ids in the order of the SHA-256 of what is before, the id, and what is after, joined by bars."""
    head, tail = "".join(f"{part}|" for part in before), "".join(f"|{part}" for part in after)
    digests = bytearray()
    for id in ids:
        digests += hashlib.sha256(f"{head}{id}{tail}".encode()).digest()
    columns = np.frombuffer(digests, dtype=">u8").reshape(-1, 4).T
    return np.lexsort(columns[::-1])
