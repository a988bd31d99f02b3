"""Which backends exist for each op, what can run here, and which one a call gets."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Mapping, Sequence
from types import ModuleType

import torch

from . import measured_choice
from .choice import Rule, of_cpu
from .cpu_kinds import cpu_kind
from .ops_table import OPS

logger = logging.getLogger("mmdpo_kernels")

_announced: set[tuple[str, str, str, torch.dtype, str]] = set()


@functools.cache
def load(op: str, backend: str) -> ModuleType:
    """The module that implements `op` in `backend`; where that cannot be imported, one whose `unavailable_reason` says why."""
    name = f"{__package__}.{backend}.{op}"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        stand_in, reason = ModuleType(name), _why_not(error)
        stand_in.unavailable_reason = lambda *call, **features: reason  # type: ignore[attr-defined]
        return stand_in


def _why_not(error: ImportError) -> str:
    if error.name is None or not isinstance(error, ModuleNotFoundError):
        return f"it cannot be imported ({error})"
    if error.name.startswith(f"{__package__}."):
        return "this copy of the package comes without it"
    return f"it needs {error.name}, which is not installed: pip install {error.name}"


def backends() -> dict[str, dict[str, str | None]]:
    """Per op, backend -> None, or the reason it cannot run here (asked for bfloat16 on a GPU, float32 on a CPU alone)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return {op: {name: load(op, name).unavailable_reason(device, dtype) for name in row.backends} for op, row in OPS.items()}


def resolve(op: str, backend: str, device: torch.device, dtype: torch.dtype, **features: object) -> ModuleType:
    """The module for a call: the named backend, or with "auto" the first that can serve it in the order that a rule has for it.

    Args:
        features: traits of the call: what some backends lack, true where used, and what the choice depends on.

    Raises:
        ValueError: unknown backend, or a named one that cannot serve the call (with its reason).
    """
    names = OPS[op].backends
    if backend == "auto":
        return _choose(op, device, dtype, features)
    if backend not in names:
        raise ValueError(f"{op}: backend must be 'auto' or one of {', '.join(map(repr, names))}, got {backend!r}")
    module = load(op, backend)
    reason = module.unavailable_reason(device.type, dtype, **features)
    if reason is not None:
        raise ValueError(f"{op}: backend {backend!r} cannot serve this call: {reason}")
    return module


def rule_for(op: str, device: torch.device, dtype: torch.dtype, features: Mapping[str, object]) -> Rule | None:
    """The rule for a call, or None where the op has none for the device."""
    rules: Sequence[Rule] = OPS[op].rules.get(device.type, ())
    if device.type == "cpu":
        rules = of_cpu(rules, cpu_kind())
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" and rules else (0, 0)
    table = next((rule for rule in rules if rule.fits(dtype, capability, features)), None)
    return measured_choice.preferred(table, op, device, dtype, features)


def _choose(op: str, device: torch.device, dtype: torch.dtype, features: dict[str, object]) -> ModuleType:
    rule = rule_for(op, device, dtype, features)
    passed_over: dict[str, str] = {}
    for name in OPS[op].backends if rule is None else rule.order:
        module = load(op, name)
        reason = module.unavailable_reason(device.type, dtype, **features)
        if reason is None:
            _announce(op, name, device, dtype, rule, passed_over)
            return module
        passed_over[name] = reason
    raise ValueError(f"{op}: no backend can serve {dtype} on {device}: {_list(passed_over)}")


def _announce(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, rule: Rule | None, passed_over: dict[str, str]
) -> None:
    on_cpu = cpu_kind() if device.type == "cpu" else None
    calls = "calls" if rule is None else rule.calls
    kind = op, backend, on_cpu or device.type, dtype, calls
    if kind in _announced:
        return
    _announced.add(kind)
    why = "not measured on this device" if rule is None else rule.reason(on_cpu)
    others = f"; passed over: {_list(passed_over)}" if passed_over else ""
    logger.info("%s: backend 'auto' takes '%s' for %s of %s on %s (%s)%s", op, backend, calls, dtype, device.type, why, others)


def _list(passed_over: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
