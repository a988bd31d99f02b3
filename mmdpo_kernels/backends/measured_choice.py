"""Rules of `backend="auto"` as measured on the GPU at hand, in place of the table's: `MMDPO_MEASURED`, see `measured`."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch

from .choice import Rule
from .measured import Measured, measured_on

KINDS = ("tree", "mass", "gradient")
"""Features that a file tells apart, beside dtype and length. A call with any other one on was not measured, so the table's rule holds for it."""


def preferred(
    table: Rule | None, op: str, device: torch.device, dtype: torch.dtype, features: Mapping[str, object]
) -> Rule | None:
    """The rule by what was measured for such calls at the length next to this one's; where nothing was, the table's.

    Backends that were not timed come after those that were, in the table's order: the file may know fewer than can serve a call.

    Raises:
        ValueError: as `measured_on`.
    """
    measured = measured_on(device)
    length = features.get("length")
    if measured is None or not isinstance(length, int) or length < 1:
        return table
    if any(on is True for name, on in features.items() if name not in KINDS):
        return table
    kind = tuple((name, features[name]) for name in KINDS if name in features)
    setting = _nearest(measured, op, str(dtype).removeprefix("torch."), kind, length)
    if setting is None:
        return table
    timed = sorted(setting["seconds"], key=lambda name: setting["seconds"][name])
    rest = [] if table is None else [name for name in table.order if name not in timed]
    words = [f"calls of some {setting['length']:,} tokens", *(name if on else f"no {name}" for name, on in kind)]
    return Rule(calls=", ".join(words), order=(*timed, *rest), measured=measured.choice_file)


@functools.lru_cache(maxsize=4096)
def _nearest(
    measured: Measured, op: str, dtype: str, kind: tuple[tuple[str, object], ...], length: int
) -> Mapping[str, Any] | None:
    """The setting of such calls whose length is next to this one's, by ratio."""
    of_kind = [
        each
        for each in measured.settings
        if (each["op"], each["dtype"]) == (op, dtype) and each["seconds"] and all(each[name] == on for name, on in kind)
    ]
    return min(of_kind, key=lambda each: abs(math.log(each["length"] / length)), default=None)
