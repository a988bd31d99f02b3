"""A rule of `backend="auto"`: what is tried, and in which order; the rules of an op are in its row of `ops_table`.

`python -m benchmarks.kernels.choose_backends` times the backends on the machine at hand, and writes
`benchmarks/results/choice_<device>.json`, where a CPU goes by its kind (`cpu_kinds`): `choice_cpu_avx2.json`. A rule names the file that its
order was read from. A rule without one is a guess that says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .cpu_kinds import nearest


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An order of backends, for the calls that it fits. The first that can serve a call is taken; a backend not named is never taken."""

    calls: str
    """Which calls these are, in words for the log."""
    order: tuple[str, ...]
    measured: str | None
    """File with the figures; None: not measured."""
    cpu: str | None = None
    """Kind of CPU that it was measured on, of `cpu_kinds.KINDS`; None: the rule is for any."""
    dtypes: tuple[torch.dtype, ...] | None = None
    """None: any."""
    capability: tuple[int, int] = (0, 0)
    """Smallest compute capability of a CUDA device."""
    lengths: tuple[int, float] = (0, float("inf"))
    """Shortest and longest packed length S."""
    traits: Mapping[str, object] = field(default_factory=dict)
    """Features of the call as the op reports them, with the values they must have."""

    def fits(self, dtype: torch.dtype, capability: tuple[int, int], features: Mapping[str, object]) -> bool:
        """Whether the rule is for such a call."""
        length = features.get("length", 0)
        assert isinstance(length, int)
        return (
            (self.dtypes is None or dtype in self.dtypes)
            and capability >= self.capability
            and self.lengths[0] <= length <= self.lengths[1]
            and all(features.get(name, False) == value for name, value in self.traits.items())
        )

    def reason(self, kind: str | None) -> str:
        """What the order rests on, for the log. kind: of the CPU that the call runs on; None: on another device."""
        on = "this device" if kind is None else f"{kind} CPUs"
        if self.measured is None:
            return f"not measured on {on}"
        if self.cpu in (None, kind):
            return f"measured on {on} in {self.measured}" if kind else f"measured in {self.measured}"
        return f"not measured on this kind of CPU, {kind}; as measured on {self.cpu} CPUs in {self.measured}"


def of_cpu(rules: Sequence[Rule], kind: str) -> list[Rule]:
    """The rules for a kind of CPU: those for any, and those measured on it or else on the nearest kind that was."""
    measured = {rule.cpu for rule in rules if rule.cpu is not None}
    like = nearest(kind, measured) if measured else None
    return [rule for rule in rules if rule.cpu in (None, like)]
