"""A long list on disk, for what there are too many of to keep in memory."""

from __future__ import annotations

import os
import pickle
import tempfile
from array import array
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, TypeVar

from mmdpo_trainers.files.atomic import writing

T = TypeVar("T")

_IN_MEMORY = 16 * 2**20
"""Bytes up to which there is no file."""


class Spool(Generic[T]):
    """A list that is appended to, whose items are in a file without a name: it is gone with the process, however that ends.

    In memory there are 8 bytes an item. folder: where the file is to be; it is made when there is much.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        # Closed with the list.
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY, dir=folder)  # noqa: SIM115
        self._ends = array("Q", [0])

    def append(self, item: T) -> None:
        data = pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL)
        with writing(self._folder, "What other files hold is kept"):
            self._file.seek(self._ends[-1])
            self._file.write(data)
            if self._ends[-1] + len(data) > _IN_MEMORY:
                self._file.flush()
        self._ends.append(self._ends[-1] + len(data))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> T:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = self._ends[index], self._ends[index + 1]
        if self._ends[-1] > _IN_MEMORY:
            # Without the file's position, which processes share that were forked from this one.
            item: T = pickle.loads(os.pread(self._file.fileno(), end - start, start))
            return item
        self._file.seek(start)
        item = pickle.loads(self._file.read(end - start))
        return item

    def __iter__(self) -> Iterator[T]:
        return (self[index] for index in range(len(self)))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Spool[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
