"""Which backends exist for each op, what can run here, and which one `backend="auto"` takes."""

from __future__ import annotations

import importlib
import logging
from types import ModuleType

import torch

logger = logging.getLogger("mmdpo_kernels")

# In the order in which "auto" tries them.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "tree_attention": ("native", "sdpa", "reference"),
    "attention_mass": ("native", "reference"),
    "linear_logprobs": ("chunked", "reference"),
    "preference_loss": ("reference",),
}
_announced: set[tuple[str, str, str]] = set()


def load(op: str, backend: str) -> ModuleType:
    """The module that implements `op` in `backend`."""
    return importlib.import_module(f"mmdpo_kernels.backends.{backend}.{op}")


def backends() -> dict[str, dict[str, str | None]]:
    """Per op, backend -> None, or the reason it cannot run here (asked for float32 on the best device of this machine)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return {op: {name: load(op, name).unavailable_reason(device, dtype) for name in names} for op, names in PREFERENCE.items()}


def resolve(op: str, backend: str, device: torch.device, dtype: torch.dtype, **features: object) -> ModuleType:
    """The module for a call: the named backend, or with "auto" the first that can serve it.

    Args:
        features: traits of the call that some backends lack, true where used.

    Raises:
        ValueError: unknown backend, or a named one that cannot serve the call (with its reason).
    """
    names = PREFERENCE[op]
    if backend == "auto":
        for name in names:
            module = load(op, name)
            if module.unavailable_reason(device.type, dtype, **features) is None:
                _announce(op, name, device)
                return module
        raise ValueError(f"{op}: no backend can serve {dtype} on {device}; tried {', '.join(names)}")
    if backend not in names:
        raise ValueError(f"{op}: backend must be 'auto' or one of {', '.join(map(repr, names))}, got {backend!r}")
    module = load(op, backend)
    reason = module.unavailable_reason(device.type, dtype, **features)
    if reason is not None:
        raise ValueError(f"{op}: backend {backend!r} cannot serve this call: {reason}")
    return module


def _announce(op: str, backend: str, device: torch.device) -> None:
    choice = (op, backend, device.type)
    if choice not in _announced:
        _announced.add(choice)
        logger.info("%s: backend 'auto' takes '%s' on %s", op, backend, device.type)
