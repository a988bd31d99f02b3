"""What `backend="auto"` tries, and in which order: one table, filled from measurements where there are any.

`python -m benchmarks.kernels.choose_backends` times the backends on the machine at hand, and writes
`benchmarks/results/choice_<device>.json`; a rule
names the file that its order was read from. A rule without one is a guess that says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An order of backends, for the calls that it fits. The first that can serve a call is taken; a backend not named is never taken."""

    calls: str
    """Which calls these are, in words for the log."""
    order: tuple[str, ...]
    measured: str | None
    """File with the figures; None: not measured."""
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


_CPU = "benchmarks/results/choice_cpu.json"
_HALF = (torch.float16, torch.bfloat16)
_PLAIN = {"tree": False, "mass": False, "softcap": False, "window": False}

# Per op and device type, the first rule that fits a call.
_RULES: dict[tuple[str, str], tuple[Rule, ...]] = {
    ("tree_attention", "cpu"): (Rule(calls="calls", order=("native", "sdpa", "reference"), measured=_CPU),),
    ("tree_attention", "cuda"): (
        Rule(
            calls="causal float16 and bfloat16 calls",
            dtypes=_HALF,
            traits=_PLAIN,
            order=("sdpa", "triton", "varlen", "flex", "reference"),
            measured=None,
        ),
        Rule(calls="calls with mass", traits={"mass": True}, order=("triton", "reference"), measured=None),
        Rule(calls="other calls", order=("triton", "varlen", "flex", "sdpa", "reference"), measured=None),
    ),
    ("attention_mass", "cpu"): (Rule(calls="calls", order=("native", "reference"), measured=_CPU),),
    ("attention_mass", "cuda"): (Rule(calls="calls", order=("native", "triton", "reference"), measured=None),),
    ("preference_loss", "cpu"): (Rule(calls="calls", order=("native", "reference"), measured=None),),
    ("preference_loss", "cuda"): (Rule(calls="calls", order=("triton", "reference"), measured=None),),
    ("linear_logprobs", "cpu"): (Rule(calls="calls", order=("native", "chunked", "reference"), measured=None),),
    ("linear_logprobs", "cuda"): (Rule(calls="calls", order=("native", "triton", "chunked", "reference"), measured=None),),
}


def rule(op: str, device: torch.device, dtype: torch.dtype, features: Mapping[str, object]) -> Rule | None:
    """The rule for a call, or None where the table has none for the op or the device."""
    rules = _RULES.get((op, device.type), ())
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" and rules else (0, 0)
    return next((rule for rule in rules if rule.fits(dtype, capability, features)), None)
