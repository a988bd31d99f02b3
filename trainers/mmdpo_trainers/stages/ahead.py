"""Batches that are prepared while the model works on the one before."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """`prepare(number)` for batch after batch, of which the next one is begun when one is taken.

    step: from a batch to the next that this process takes. Pillow opens and draws pictures without Python's lock, so that a thread is enough.
    """

    def __init__(self, prepare: Callable[[int], T], count: int, *, step: int = 1) -> None:
        self._prepare, self._count, self._step = prepare, count, step
        self._begun: dict[int, Future[T]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")

    def take(self, number: int) -> T:
        """What was prepared for a batch, or is now. Raises what `prepare` raises."""
        begun = self._begun.pop(number, None) or self._pool.submit(self._prepare, number)
        # Others were expected to be next: batches that are done are passed over.
        for other in self._begun.values():
            other.cancel()
        self._begun.clear()
        if number + self._step < self._count:
            self._begun[number + self._step] = self._pool.submit(self._prepare, number + self._step)
        return begun.result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
