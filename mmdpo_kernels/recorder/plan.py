"""What the attention calls of one forward have in common, found out once for all layers that are alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.attention_mass import PreparedMass


class LayerCall(NamedTuple):
    """One attention call of a model, beside its query (B, Hq, L, D) and key (B, Hkv, K, D)."""

    tree_end: Tensor | None
    """(B, K); None: `mask`, or causal."""
    mask: Tensor | None
    """(B or 1, 1, L, K) bool, or 0 and -inf."""
    scale: float | None
    softcap: float | None
    window: int | None
    backend: str
    """Of `attention_mass`."""
    reach: Tensor | None = None
    """(B, K), beside `tree_end`; None: no row looks ahead."""


@dataclass
class Part:
    """Counted rows that one call of `attention_mass` serves."""

    rows: slice
    tree_end: Tensor | None
    """(B, K)"""
    positions: Tensor
    """(B, R), -1 = unused."""
    counted: Tensor
    """(B,)"""
    mass: PreparedMass | None = None
    joined: tuple[Tensor | None, Tensor | None] | None = None
    """Of a decoding step: what `WaitingSteps` had seen before it, and is with it; None: not known, or they do not go together."""


class Plan:
    """What attention calls of one forward that differ in their numbers alone have in common: most layers of most models."""

    def __init__(self, crosses: bool, query: Tensor, key: Tensor, call: LayerCall) -> None:
        self.crosses = crosses
        self.index: Tensor | None = None
        """(B, Hq, R, D) of the counted rows, for `gather`; None where no row counts."""
        self.segments = torch.empty(0)
        """(B, K)"""
        self.first_key = self.num_keys = 0
        """The token that the first key is of, and keys that are there from it on."""
        self.parts: list[Part] = []
        self._call, self._kind = call, _kind(query, key, call)

    def serves(self, crosses: bool, query: Tensor, key: Tensor, call: LayerCall) -> bool:
        """Whether another call is like this one."""
        alike = crosses == self.crosses and _kind(query, key, call) == self._kind
        mine = self._call
        return alike and all(map(_same, (call.tree_end, call.reach, call.mask), (mine.tree_end, mine.reach, mine.mask)))


def _kind(query: Tensor, key: Tensor, call: LayerCall) -> tuple[object, ...]:
    sizes = query.shape, key.shape, query.dtype, key.dtype, query.device, key.device
    return *sizes, call.scale, call.softcap, call.window, call.backend


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether they are one memory: layers are given views of one mask."""
    if one is None or other is None or one is other:
        return one is other
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
