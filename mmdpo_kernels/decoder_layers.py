"""What the layers of a transformers decoder do, by their own code: which attend by the attention interface, which carry a state along.

No class or family is named: a module is known by what its code calls.
"""

from __future__ import annotations

import functools
import inspect
from types import CodeType, FunctionType
from typing import Any

from torch import nn

CARRYING = "linear_attention"
"""The kind, in a configuration's `layer_types`, of layers that carry a state from token to token."""

_INTERFACE = "get_interface"
"""Of `ALL_ATTENTION_FUNCTIONS`: what a module asks for the attention function by."""

_STATES = frozenset({"get_conv_state", "update_conv_state", "get_recurrent_state", "update_recurrent_state"})
"""What a layer asks a cache for its states by, from transformers 5.22."""


def calls_interface(tower: nn.Module) -> bool:
    """Whether all attention of a decoder goes through transformers' attention interface: in each layer a module calls it or carries a state."""
    count = getattr(getattr(tower, "config", None), "num_hidden_layers", None)
    if not isinstance(count, int):
        return False
    found = {module.layer_idx for module in _numbered(tower) if _INTERFACE in _names(type(module))}
    return bool(found) and found | carrying_layers(tower) >= set(range(count))


def carrying_layers(tower: nn.Module) -> frozenset[int]:
    """Layers that carry a state in place of attending, by the configuration."""
    kinds = getattr(tower.config, "layer_types", None) or ()
    return frozenset(layer for layer, kind in enumerate(kinds) if kind == CARRYING)


def carriers(tower: nn.Module) -> list[Any]:
    """The modules of these layers that carry the state, in the layers' order."""
    layers = carrying_layers(tower)
    return [module for module in _numbered(tower) if module.layer_idx in layers and carries(module)]


def carries(module: nn.Module) -> bool:
    """Whether a module carries a state from token to token, by what it asks a cache for."""
    return _names(type(module)) >= _STATES


def carry_refusal(tower: nn.Module) -> str | None:
    """Why a tree's states cannot be carried from node to node in a decoder, or None where they can (or none are)."""
    layers = carrying_layers(tower)
    if not layers:
        return None
    found = carriers(tower)
    if sorted(module.layer_idx for module in found) != sorted(layers):
        return f"there are layers of {CARRYING}, whose states go by a cache's methods from transformers 5.22 on, and not here"
    for module in tower.modules():
        other = _names(type(module)) & _STATES
        if other and module not in found:
            return f"{type(module).__name__} carries a state too, beside the layers of {CARRYING}"
    return None


def cache_argument(module: nn.Module) -> str:
    """The name of a carrier's argument for its cache: transformers renames it in 5.24."""
    names = inspect.signature(type(module).forward).parameters
    return "cache" if "cache" in names else "cache_params"


def _numbered(tower: nn.Module) -> list[Any]:
    return [module for module in tower.modules() if isinstance(getattr(module, "layer_idx", None), int)]


def _names(kind: Any) -> frozenset[str]:
    """Names of attributes and functions that the methods of a module's class use."""
    return _names_of_class(kind)  # whose cache asks for hashable arguments, which type checkers do not take a module's class for


@functools.lru_cache(maxsize=512)
def _names_of_class(kind: Any) -> frozenset[str]:
    found: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.startswith("torch.") or base is object:
            continue
        for value in vars(base).values():
            function = inspect.unwrap(value) if callable(value) else None
            if isinstance(function, FunctionType):
                found |= _names_of(function.__code__)
    return frozenset(found)


def _names_of(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names_of, inner))
