"""Tile sizes of the tree-attention kernels: one small table by GPU, element size and head dim, nothing tuned at first use.

Chosen as the largest that compile for the target without spilled registers; the sizes to start from are those of PyTorch's FlexAttention.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tiles:
    """How one kernel cuts its work."""

    block_m: int
    """Queries of a tile."""
    block_n: int
    """Keys of a tile."""
    num_warps: int
    num_stages: int
    """Tiles in flight between global and shared memory."""
    descriptors: bool = False
    """Tiles of the loop come by tensor descriptors: the copy engine of sm_90 and newer fetches them."""
    specialize: bool = False
    """Loads, products and exponentials in warps of their own, where the compiler can part them; it adds warps."""
    overlap: bool = False
    """The softmax of a block runs beside the product before it."""

    @property
    def words(self) -> str:
        """For labels and tables: `128x64, 8 warps, 3 stages, descriptors`."""
        extras = [name for name in ("descriptors", "specialize", "overlap") if getattr(self, name)]
        return ", ".join([f"{self.block_m}x{self.block_n}", f"{self.num_warps} warps", f"{self.num_stages} stages", *extras])


@dataclass(frozen=True)
class TreeAttentionTiles:
    """Tiles of the three passes over (query block, key block) pairs."""

    forward: Tiles
    grad_key: Tiles
    """One program per key block."""
    grad_query: Tiles
    """One program per query block."""


FEATURES = ("reach", "window", "softcap", "mass")
"""Of a call, what takes registers beside the products."""

WIDEST = 256
"""The widest head that the tables serve."""

CORRECTION = Tiles(64, 0, 4, 1)
"""Of the pass over rows that comes before the other backward ones; it has no keys."""

_EVERY = ("causal", "tree", "tree mass")

CANDIDATES: dict[str, dict[Tiles, tuple[str, ...]]] = {
    "forward": {
        Tiles(128, 64, 8, 3, descriptors=True): _EVERY,
        Tiles(128, 128, 8, 2, descriptors=True): ("causal", "tree"),
        Tiles(128, 64, 8, 3, descriptors=True, overlap=True): _EVERY,
        Tiles(128, 128, 8, 2, descriptors=True, overlap=True): ("causal",),
        Tiles(128, 64, 4, 3, descriptors=True, specialize=True): ("causal", "tree"),
        Tiles(128, 128, 4, 2, descriptors=True, specialize=True): ("causal",),
    },
    "grad_key": {
        Tiles(32, 128, 8, 3, descriptors=True): ("causal", "tree"),
        Tiles(64, 128, 8, 2, descriptors=True): ("causal", "tree"),
        Tiles(64, 64, 4, 2, descriptors=True): ("causal", "tree"),  # two programs share a processor
        Tiles(32, 128, 8, 2, descriptors=True, overlap=True): _EVERY,
        Tiles(64, 64, 8, 2, descriptors=True, overlap=True): _EVERY,
        Tiles(32, 128, 4, 2, descriptors=True, specialize=True): ("causal",),
    },
    "grad_query": {
        Tiles(128, 64, 8, 3, descriptors=True): _EVERY,
        Tiles(128, 128, 8, 2, descriptors=True): ("causal", "tree"),
        Tiles(128, 64, 8, 2, descriptors=True, overlap=True): _EVERY,
    },
}
"""For sm_90, half precision and head dim 128, by pass: tiles, and the calls for which they compile without spills. Measured nowhere yet.

No call takes one but under `override`. Triton cannot part the warps of other calls and passes (`specialize`).
"""

_override: list[TreeAttentionTiles] = []


def choose(
    width: int, dtype: torch.dtype, capability: tuple[int, int], features: Collection[str] = frozenset()
) -> TreeAttentionTiles:
    """width: head dim or that of values, the larger. features: of FEATURES, those that the call has."""
    if _override:
        return _override[-1]
    column = next(widest for widest in (64, 128, 256) if width <= widest)
    heavy = not {"mass", "softcap"}.isdisjoint(features)
    if dtype == torch.float32:
        return (_FLOAT32_HEAVY if heavy else _FLOAT32).get(column, _FLOAT32[column])
    family = {9: "hopper", 10: "blackwell"}.get(capability[0], "ampere")
    chosen = (_HALF_HEAVY if heavy else _HALF)[family][column]
    present = {*features, "heavy" if heavy else "light", *(["padded"] if width != column else [])}
    for tight in _TIGHT:
        if (tight.family, tight.column) == (family, column) and tight.when <= present:
            chosen = replace(chosen, **tight.tiles)
    return chosen


def overridden() -> bool:
    """Whether `override` is at work."""
    return bool(_override)


@contextmanager
def override(forward: Tiles, grad_key: Tiles | None = None, grad_query: Tiles | None = None) -> Iterator[None]:
    """These tiles whatever the call: for tests, which want many blocks of few tokens, and for measurements."""
    _override.append(TreeAttentionTiles(forward, grad_key or forward, grad_query or forward))
    try:
        yield
    finally:
        _override.pop()


_HALF = {
    # Up to 99 KB of shared memory, which the GPUs of 8.6, 8.9 and 12.x have too.
    "ampere": {
        64: TreeAttentionTiles(Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 2), Tiles(128, 64, 8, 3)),
        128: TreeAttentionTiles(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(128, 32, 8, 2)),
        256: TreeAttentionTiles(Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2), Tiles(64, 32, 8, 1)),
    },
    "hopper": {
        64: TreeAttentionTiles(Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 3), Tiles(128, 64, 8, 3)),
        128: TreeAttentionTiles(Tiles(128, 64, 8, 3), Tiles(32, 128, 8, 3), Tiles(128, 64, 8, 3)),
        256: TreeAttentionTiles(Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2)),
    },
    # All accumulators of a kernel have to fit the 512 columns of tensor memory.
    "blackwell": {
        64: TreeAttentionTiles(Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 3), Tiles(128, 64, 8, 3)),
        128: TreeAttentionTiles(Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 3), Tiles(128, 64, 8, 3)),
        256: TreeAttentionTiles(Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2), Tiles(64, 64, 8, 1)),
    },
}

_HALF_HEAVY = {
    "ampere": {
        64: TreeAttentionTiles(Tiles(128, 64, 8, 3), Tiles(32, 64, 8, 2), Tiles(128, 64, 8, 3)),
        128: TreeAttentionTiles(Tiles(128, 32, 8, 2), Tiles(32, 64, 8, 2), Tiles(128, 32, 8, 2)),
        256: TreeAttentionTiles(Tiles(64, 32, 8, 2), Tiles(16, 32, 8, 1), Tiles(32, 32, 8, 1)),
    },
    "hopper": {
        64: TreeAttentionTiles(Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 3), Tiles(128, 64, 8, 3)),
        128: TreeAttentionTiles(Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 2), Tiles(128, 64, 8, 3)),
        256: TreeAttentionTiles(Tiles(64, 32, 8, 2), Tiles(16, 32, 8, 1), Tiles(64, 32, 8, 2)),
    },
    "blackwell": {
        64: TreeAttentionTiles(Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2), Tiles(128, 64, 8, 3)),
        128: TreeAttentionTiles(Tiles(128, 32, 8, 3), Tiles(32, 128, 8, 3), Tiles(128, 64, 8, 3)),
        256: TreeAttentionTiles(Tiles(64, 64, 8, 2), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)),
    },
}


@dataclass(frozen=True)
class _Tight:
    """Other tiles, mostly smaller, for calls whose features together would spill those of the tables."""

    family: str
    column: int
    when: frozenset[str]
    """Features of the call; also "light" or "heavy" (the table), and "padded" (masks over the columns of a padded head)."""
    tiles: Mapping[str, Tiles]


def _tight(family: str, column: int, when: str, **smaller: Tiles) -> _Tight:
    return _Tight(family, column, frozenset(when.split()), smaller)


# Later ones go over earlier ones. What spills is for the compiler to say: `ahead_of_time --all` asks it for every set of features.
_TIGHT = (
    _tight("ampere", 64, "light window", grad_key=Tiles(32, 128, 8, 2)),
    _tight("ampere", 64, "softcap", grad_query=Tiles(128, 32, 8, 3)),
    _tight("ampere", 64, "window mass", grad_query=Tiles(128, 32, 8, 3)),
    _tight("ampere", 128, "heavy padded", forward=Tiles(64, 64, 8, 2)),
    _tight("ampere", 128, "light reach", forward=Tiles(128, 32, 8, 2)),
    _tight("ampere", 128, "light window", forward=Tiles(128, 32, 8, 2)),
    _tight("ampere", 128, "light reach window", grad_key=Tiles(32, 64, 8, 2)),
    _tight("ampere", 128, "softcap mass", grad_query=Tiles(64, 32, 8, 2)),
    _tight("ampere", 128, "window mass", grad_query=Tiles(64, 32, 8, 2)),
    _tight("hopper", 128, "heavy reach", grad_key=Tiles(32, 128, 8, 3)),
    _tight("hopper", 128, "softcap", grad_key=Tiles(32, 128, 8, 2)),
    _tight("hopper", 256, "softcap mass", grad_query=Tiles(32, 64, 8, 2)),
    _tight("blackwell", 64, "window mass", forward=Tiles(128, 32, 8, 3)),
    _tight("blackwell", 128, "softcap", forward=Tiles(128, 64, 8, 3)),
    _tight("blackwell", 128, "softcap mass", forward=Tiles(128, 32, 8, 3)),
)

# Outside the tensor cores, the same on all. Of head dim 256 no tile is small enough for all calls: some spill.
_FLOAT32 = {
    64: TreeAttentionTiles(Tiles(32, 32, 4, 2), Tiles(16, 32, 8, 1), Tiles(32, 32, 8, 1)),
    128: TreeAttentionTiles(Tiles(16, 16, 8, 1), Tiles(16, 32, 8, 1), Tiles(16, 16, 8, 1)),
    256: TreeAttentionTiles(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
}
# Where masses, or a softcap, would spill.
_FLOAT32_HEAVY = {
    64: replace(_FLOAT32[64], forward=Tiles(32, 32, 8, 1)),
    128: replace(_FLOAT32[128], grad_key=Tiles(16, 16, 8, 1)),
}
