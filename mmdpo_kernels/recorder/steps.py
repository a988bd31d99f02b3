"""Decoding steps whose masses are taken together: reading the keys is what a row costs, whoever it is for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..ops.attention_mass import attention_mass
from .plan import LayerCall, Part, Plan

Taken = tuple[int, Tensor, Tensor]
"""A layer, the masses of its steps, and how many rows of each batch row they count, (B,)."""

_TOGETHER = 16
"""Steps to a call: on a CPU eight rows cost no more than one."""


@dataclass
class _Waiting:
    """Steps of a layer, and keys that hold those of every step."""

    queries: list[Tensor]
    """(B, Hq, 1, D) a step."""
    positions: list[Tensor]
    """(B, 1) a step."""
    key: Tensor
    """Of the last step, as the rest."""
    seen: Tensor | None
    """(B, K) bool: the keys that rows see which come after them; None: all."""
    segments: Tensor
    call: LayerCall


class WaitingSteps:
    """The steps of all layers that wait; `num_segments` and `reduce` are those of `attention_mass`."""

    def __init__(self, num_segments: int, reduce: str | None) -> None:
        self._num_segments, self._reduce = num_segments, reduce
        self._waiting: dict[int, _Waiting] = {}
        self._addresses: dict[int, int] = {}
        """Where each layer's keys were in its last call that counted rows."""

    def keeps_keys(self, layer: int, key: Tensor) -> bool:
        """Whether the layer's cache grows, giving new memory each time; one of fixed size writes over what earlier steps saw."""
        before, self._addresses[layer] = self._addresses.get(layer), key.data_ptr()
        return before not in (None, key.data_ptr())

    def wait(self, layer: int, plan: Plan, query: Tensor, key: Tensor, call: LayerCall) -> list[Taken]:
        """Put a step of one row to those that wait; returns what was taken because it does not go with them, or they are enough."""
        [part] = plan.parts
        taken: list[Taken] = []
        waiting = self._waiting.get(layer)
        if waiting is not None and not _goes_with(part, waiting, key.shape[2]):
            taken = self.take(layer)
            waiting = None
        if waiting is None:
            seen = None if part.tree_end is None else part.tree_end >= key.shape[2]
            waiting = self._waiting[layer] = _Waiting([], [], key, seen, plan.segments, call)
        elif part.joined is not None:
            waiting.seen = part.joined[1]
        # Of these only the newest are needed, and older keys would be kept from being freed.
        waiting.key, waiting.segments = key.detach(), plan.segments
        waiting.queries.append(query.clone())
        waiting.positions.append(part.positions)
        if len(waiting.queries) == _TOGETHER:
            taken = [*taken, *self.take(layer)]
        return taken

    @torch.no_grad()
    def take(self, *layers: int) -> list[Taken]:
        """The masses of steps that wait, of some layers or all; they wait no more."""
        taken: list[Taken] = []
        for layer in layers or tuple(self._waiting):
            waiting = self._waiting.pop(layer, None)
            if waiting is None:
                continue
            positions, call = torch.cat(waiting.positions, dim=1), waiting.call
            tree_end = None
            if waiting.seen is not None:
                index = torch.arange(waiting.key.shape[2], dtype=torch.int32, device=waiting.key.device)
                tree_end = torch.where(waiting.seen, waiting.key.shape[2], index).to(torch.int32)
            found = attention_mass(
                torch.cat(waiting.queries, dim=2),
                waiting.key,
                waiting.segments,
                row_positions=positions,
                num_segments=self._num_segments,
                tree_end=tree_end,
                scale=call.scale,
                softcap=call.softcap,
                reduce=self._reduce,
                backend=call.backend,
            )
            taken.append((layer, found, (positions >= 0).sum(1)))
        return taken


def _goes_with(part: Part, waiting: _Waiting, length: int) -> bool:
    """Whether a decoding step sees what the waiting ones see and one token more; a window, for one, moves on. Sets `part.joined`."""
    if length != waiting.key.shape[2] + 1 or (part.tree_end is None) != (waiting.seen is None):
        return False
    if part.joined is not None and part.joined[0] is waiting.seen:
        return True  # as in the layer before
    if part.tree_end is None or waiting.seen is None:
        part.joined = None, None
        return True
    # A row that has ended sees nothing any more, and its earlier steps what they saw.
    used, seen = part.positions >= 0, part.tree_end >= length
    before = pad(waiting.seen, (0, 1))
    if not bool(((seen == before)[:, :-1] | ~used).all()):
        return False
    part.joined = waiting.seen, torch.where(used, seen, before)
    return True
