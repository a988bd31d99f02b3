"""Several addresses of one thing: whose turn it is, which is dead, which has come back."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

logger = logging.getLogger(__name__)

_DEAD = 3
"""Failures of an address, none of its answers between them, after which it is left out where there is another."""


@dataclass(eq=False)
class Address:
    """One address. under_way: requests that it has now. failures: since its last answer. out: why it is left out."""

    url: str
    under_way: int = 0
    asked: int = 0
    failures: int = 0
    out: str | None = None


class Addresses:
    """The one with the fewest requests under way comes first. The last one that is there is never left out: it is asked again."""

    def __init__(self, urls: Sequence[str], who: str) -> None:
        self.all = [Address(url.rstrip("/")) for url in urls]
        self._who, self._lock = who, threading.Lock()

    @property
    def left_out(self) -> list[Address]:
        return [each for each in self.all if each.out is not None]

    @contextlib.contextmanager
    def one(self, unlike: Address | None = None) -> Iterator[Address]:
        """An address for a request, counted as its own while it lasts. unlike: what has just failed it, if there is another."""
        with self._lock:
            there = [each for each in self.all if each.out is None]
            chosen = min(there, key=lambda each: (each is unlike, each.under_way, each.asked))
            chosen.under_way += 1
            chosen.asked += 1
        try:
            yield chosen
        finally:
            with self._lock:
                chosen.under_way -= 1

    def another(self, address: Address) -> bool:
        """Whether there is another to ask at once, one that answers as far as is known."""
        return any(each.out is None and each is not address and not each.failures for each in self.all)

    def saw(self, address: Address, gone: str | None) -> None:
        """What came of a request. gone: why nobody answered; None: somebody did."""
        if gone is None:
            address.failures = 0
            return
        with self._lock:
            address.failures += 1
            dead = address.failures >= _DEAD and address.out is None
        if dead:
            self.leave_out(address, gone)

    def leave_out(self, address: Address, why: str) -> None:
        """Ask it no more, where there is another, and say so."""
        with self._lock:
            left = sum(each.out is None and each is not address for each in self.all)
            if address.out is not None or not left:
                return
            address.out = why
        logger.warning(
            "%s at %s is left out (%s); %d of %d addresses go on with the work", self._who, address.url, why, left, len(self.all)
        )

    def take_back(self, address: Address) -> None:
        address.out, address.failures = None, 0
        logger.warning("%s at %s answers again, and is asked again", self._who, address.url)

    def others(self) -> str:
        """The addresses that are left out, for an error's end; "": none."""
        out = "; ".join(f"{each.url}: {each.out}" for each in self.left_out)
        return f", and the others were left out before ({out})" if out else ""
