"""The ops, a row each: backends and what "auto" takes, kernels that are compiled ahead of time, benchmarks, tests for a GPU.

A new op is `backends/reference/<op>.py`, a module of that name in the folder of every other backend it has, and a row here; what loads, lists,
compiles, measures or tests ops reads this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .choice import Rule

_HALF = (torch.float16, torch.bfloat16)
_PLAIN = {"tree": False, "mass": False, "softcap": False, "window": False, "reach": False}


def _measured(*kinds: str, order: tuple[str, ...], calls: str = "calls", **fits: Any) -> tuple[Rule, ...]:
    """A rule for calls on a CPU, for each kind of it whose file has the op with this order. fits: which calls, as `Rule` has it; none: all."""
    files = {kind: f"benchmarks/results/choice_cpu_{kind}.json" for kind in kinds}
    return tuple(Rule(calls=calls, order=order, cpu=kind, measured=file, **fits) for kind, file in files.items())


@dataclass(frozen=True, kw_only=True)
class Op:
    """What there is of one op, beside the function that users call."""

    backends: tuple[str, ...]
    """Folders of `backends/`. In this order "auto" tries them where no rule is for the device."""
    rules: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)
    """By device type; the first that fits a call has the order for it."""
    ahead_of_time: tuple[str, ...] = ()
    """Modules of `backends/triton` with `specializations` and REPRESENTATIVE, see `ahead_of_time`."""
    benchmarks: tuple[str, ...] = ()
    """Modules in the benchmarks' folder `ops`, with CASES and `prepare`."""
    gpu_tests: tuple[str, ...] = ()
    """Test modules that a GPU run takes, by name wherever they lie, those that compile most first."""


OPS: dict[str, Op] = {
    "tree_attention": Op(
        backends=("native", "triton", "varlen", "flex", "sdpa", "reference"),
        rules={
            "cpu": (
                *_measured(
                    "amx",
                    calls="long causal bfloat16 calls without a gradient",
                    dtypes=(torch.bfloat16,),
                    lengths=(1000, float("inf")),
                    traits={**_PLAIN, "gradient": False},
                    order=("sdpa", "native", "reference"),
                ),
                *_measured("avx2", "amx", order=("native", "sdpa", "reference")),
            ),
            "cuda": (
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
        },
        ahead_of_time=("tree_attention",),
        benchmarks=("tree_attention",),
        gpu_tests=("test_triton_tree_attention", "test_tree_attention", "test_native_tree_attention", "test_varlen_flex"),
    ),
    "attention_mass": Op(
        backends=("native", "triton", "reference"),
        rules={
            "cpu": (
                *_measured("amx", calls="float64 calls", dtypes=(torch.float64,), order=("reference",)),
                *_measured("avx2", "amx", order=("native", "reference")),
            ),
            "cuda": (Rule(calls="calls", order=("native", "triton", "reference"), measured=None),),
        },
        ahead_of_time=("attention_mass",),
        benchmarks=("attention_mass",),
        gpu_tests=("test_triton_attention_mass", "test_attention_mass", "test_native"),
    ),
    "linear_logprobs": Op(
        backends=("native", "triton", "chunked", "reference"),
        rules={
            "cpu": _measured("amx", order=("native", "chunked", "reference")),
            "cuda": (Rule(calls="calls", order=("native", "triton", "chunked", "reference"), measured=None),),
        },
        ahead_of_time=("logit_rows",),
        benchmarks=("linear_logprobs", "logit_rows"),
        gpu_tests=("test_triton_linear_logprobs", "test_linear_logprobs", "test_native_linear_logprobs", "test_shared_rows"),
    ),
    "preference_loss": Op(
        backends=("native", "triton", "reference"),
        rules={
            "cpu": _measured("amx", order=("native", "reference")),
            "cuda": (Rule(calls="calls", order=("triton", "reference"), measured=None),),
        },
        ahead_of_time=("preference_loss",),
        benchmarks=("preference_loss",),
        gpu_tests=("test_preference_loss", "test_preference_loss_backends"),
    ),
}
