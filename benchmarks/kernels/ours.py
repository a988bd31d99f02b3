"""This project's backends as contestants, each by its name and as `"auto"` chooses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.kernels import ops
from benchmarks.kernels.case import Contestant, Run
from mmdpo_kernels.backends.ops_table import OPS
from mmdpo_kernels.backends.registry import load


def contestants(name: str) -> list[Contestant]:
    """Every backend of the op, "auto", and the variants that its benchmark has of them."""
    module, op = ops.modules()[name], ops.op_of(name)
    backends = getattr(module, "BACKENDS", ("auto", *OPS[op].backends))
    found = [_contestant(op, backend, module.prepare, backend) for backend in backends]
    for ending, (prepare, some) in getattr(module, "VARIANTS", {}).items():
        found += [_contestant(op, f"{backend}{ending}", prepare, backend) for backend in some or backends]
    return found


def _contestant(op: str, name: str, prepare: Callable[[Any, str], Run], backend: str) -> Contestant:
    return Contestant(
        name=name,
        ours=True,
        prepare=lambda problem: prepare(problem, backend),
        unavailable_reason=partial(_unavailable_reason, op, backend),
    )


def _unavailable_reason(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    if backend == "auto":
        return None
    if backend == "triton" and device_type == "cpu":
        return "its kernels are only interpreted on the CPU, which says nothing about speed"
    reason: str | None = load(op, backend).unavailable_reason(device_type, dtype)
    return reason
