"""How a row of logits is cut into blocks, by element size and statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Block(NamedTuple):
    """How a program reads its row."""

    columns: int
    """Read together."""
    num_warps: int
    num_stages: int
    """Blocks in flight between global memory and registers."""
    registers: int
    """A thread may use: 64 let four programs of 8 warps share a processor, 80 three."""
    keep: bool = False
    """Where a row is read again for its gradient, the caches are asked to keep it until then, and to let it go after."""

    @property
    def words(self) -> str:
        """For labels and tables: `2048, 8 warps, 4 stages, 64 registers, keep`."""
        sizes = f"{self.columns}, {self.num_warps} warps, {self.num_stages} stages, {self.registers} registers"
        return sizes + ", keep" * self.keep


CANDIDATES = (
    Block(2048, 8, 2, 64),
    Block(2048, 8, 6, 64),
    Block(2048, 8, 4, 64, keep=True),
    Block(1024, 4, 4, 64),
    Block(1024, 8, 4, 64),
    Block(4096, 8, 3, 128),
    Block(4096, 16, 4, 64),
    Block(4096, 16, 4, 64, keep=True),
    Block(8192, 32, 3, 64),
)
"""For rows of bfloat16 without statistics; none spills. Measured nowhere yet: no call takes one but under `override` or from a sweep's file."""


_override: list[Block] = []

RUNNING = ("entropy", "mean_logit")
"""Statistics that cost every lane one more running value."""


def choose(dtype: torch.dtype, stats: tuple[str, ...], measured: Block | None = None) -> Block:
    """The block for a call. measured: what a sweep has found for such calls."""
    return _override[-1] if _override else measured or block_of(dtype, stats)


def block_of(dtype: torch.dtype, stats: tuple[str, ...]) -> Block:
    """At most 16 bytes a thread, and few enough that nothing spills on sm_80, sm_90 and sm_100, see `ahead_of_time`.

    8 or 12 KiB of a row are on their way at a time: two programs a processor keep as much in flight as memory can bring.
    """
    running = any(name in RUNNING for name in stats)
    columns = 1024 if running or dtype == torch.float32 else 2048
    return Block(columns, 8, 5 if running else 4, 80 if running else 64)


@contextmanager
def override(block: Block) -> Iterator[None]:
    """This block whatever the call: for tests, which want many blocks of few columns, and for measurements."""
    _override.append(block)
    try:
        yield
    finally:
        _override.pop()
