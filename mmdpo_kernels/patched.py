"""What a patched model carries: state as plain attributes of its modules, so that copies have their own and `torch.compile` finds it there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .decoder_layers import calls_interface

if TYPE_CHECKING:
    from .path_maps import PathMaps
    from .recorder import AttentionRecorder

# Without "flash" or "/", which transformers reads as its own kernels and as hub addresses.
IMPLEMENTATION = "mmdpo_tree"

_STATE = "_mmdpo_patch"
_PLACE = "_mmdpo_attention"


on_unpickling: list[Callable[[], None]] = []
"""What makes a patched model that comes from elsewhere work in this process; `patch` puts it here."""


@dataclass(eq=False)
class PatchState:
    """What a patched language tower's attention function needs to know; one object for tower and layers, copied and pickled with them."""

    backend: str = "auto"
    mass_backend: str = "auto"
    recorder: AttentionRecorder | None = None
    paths: PathMaps | None = None
    tree_refusal: str | None = None
    cross_layers: frozenset[int] = frozenset()
    """Layers whose keys are of pictures, and not of the tokens."""
    carrying_layers: frozenset[int] = frozenset()
    """Layers that carry a state from token to token and attend to nothing."""
    originals: list[tuple[Any, str | None]] = field(default_factory=list)
    """The tower's configurations with the attention implementation that each had before."""

    def __post_init__(self) -> None:
        _LIVE.add(self)

    def holds(self, config: Any) -> bool:
        """Whether the configuration is one of this tower's."""
        return any(held is config for held, _ in self.originals)

    def __getstate__(self) -> dict[str, Any]:
        # Recorders watch one model, and no copy of it.
        return {**self.__dict__, "recorder": None, "paths": None}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
        _LIVE.add(self)
        # A model that was pickled elsewhere names an implementation that transformers may not know in this process.
        for work in on_unpickling:
            work()


@dataclass(eq=False)
class AttentionPlace:
    """Where an attention module stands in a patched tower."""

    state: PatchState
    crosses: bool
    """Whether its keys are of pictures."""
    layer: Tensor
    """() int64 on the CPU: as data it tells layers apart in compiled code that they share."""


# Looked at when models are patched and unpatched only: a configuration may be several models' own.
_LIVE: WeakSet[PatchState] = WeakSet()


def language_tower(model: nn.Module) -> Any:
    """The decoder of a transformers model, under PEFT or not.

    Raises:
        ValueError: no decoder that uses the attention interface.
    """
    base: Any = model
    if hasattr(model, "get_base_model"):  # PEFT
        base = model.get_base_model()  # type: ignore[operator]
    tower = base.get_decoder() if hasattr(base, "get_decoder") else None
    # Some decoders call the interface and do not say so.
    says_so = getattr(tower, "_supports_attention_backend", False) or (tower is not None and state_of(tower) is not None)
    if tower is None or not (says_so or calls_interface(tower)):
        found = "no get_decoder()" if tower is None else f"decoder {type(tower).__name__}"
        raise ValueError(
            f"{type(base).__name__} cannot be patched: {found} uses transformers' attention interface "
            "(a model with get_decoder() is needed whose class sets _supports_attention_backend, or whose layers all call "
            "ALL_ATTENTION_FUNCTIONS.get_interface)"
        )
    return tower


def state_of(tower: nn.Module) -> PatchState | None:
    """The tower's state, or None where it is not patched."""
    return getattr(tower, _STATE, None)


def place_of(module: nn.Module) -> AttentionPlace | None:
    """An attention module's place, or None where its model is not patched."""
    return getattr(module, _PLACE, None)


def attach(tower: nn.Module, state: PatchState) -> None:
    """Give the tower and its layers their state."""
    tower.__dict__[_STATE] = state
    for module in tower.modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int):
            number = torch.tensor(layer, device="cpu")
            module.__dict__[_PLACE] = AttentionPlace(state, layer in state.cross_layers, number)


def detach(tower: nn.Module) -> None:
    """Take it away again."""
    tower.__dict__.pop(_STATE, None)
    for module in tower.modules():
        module.__dict__.pop(_PLACE, None)


def remember_configs(state: PatchState, tower: Any) -> None:
    """Note what the tower's configurations ask for before they are pointed at the patched attention."""
    known = {id(config): before for config, before in state.originals}
    state.originals = []
    for config in configs_of(tower):
        others = [each for each in _LIVE if each is not state and each.holds(config)]
        before = config._attn_implementation_internal
        if before == IMPLEMENTATION:
            shared = (original for each in others for held, original in each.originals if held is config)
            before = known[id(config)] if id(config) in known else next(shared, default_implementation(tower))
        for each in others:
            each.originals = [(held, before if held is config else its) for held, its in each.originals]
        state.originals.append((config, before))


def restore_configs(state: PatchState | None, tower: Any) -> None:
    """Give the tower's configurations back what they had, but those that another patched tower shares."""
    before = {} if state is None else {id(config): original for config, original in state.originals}
    for config in configs_of(tower):
        shared = any(each is not state and each.holds(config) for each in _LIVE)
        if config._attn_implementation_internal == IMPLEMENTATION and not shared:
            config._attn_implementation_internal = before.get(id(config), default_implementation(tower))
    if state is not None:
        state.originals = []


def configs_of(tower: Any) -> list[Any]:
    """The distinct configurations inside the tower."""
    found: dict[int, Any] = {}
    for module in tower.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            found.setdefault(id(config), config)
    return list(found.values())


def default_implementation(tower: Any) -> str:
    """What transformers gives a model of this class when nothing is asked for."""
    return "sdpa" if getattr(tower, "_supports_sdpa", False) else "eager"
