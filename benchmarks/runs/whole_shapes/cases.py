"""Who trains, by which settings: a case is one way to train one shape by one method."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import is_flash_attn_3_available

from benchmarks.runs.training_step.sides import EPOCHS, MDPO, Side, ours
from benchmarks.runs.whole_shapes.shapes import METHODS, SHAPES

OURS = "ours"
TRL = "TRL"
CHECKPOINTED = f"{OURS}, checkpointing"
WITHOUT = {
    "tree": {"tree_packing": False},
    "shared vision": {"own_vision": True},
    "cached reference": {"precompute_ref_log_probs": False},
}
"""Feature -> settings with which it is off."""
OFFICIAL = "official, response rows"
WITHOUT_ALL = f"{OURS}, without all three"


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to train, and the attention that it is held to."""

    side: Side
    attention: str | None = None
    """`cudnn` or `fa3`; None: PyTorch's SDPA as it chooses."""
    worth: int = 0
    """Those of the least are measured first."""

    def reason(self, shape: str, device: torch.device) -> str | None:
        """Why it cannot be had here; None: it can."""
        if self.side.kind == "trl" and find_spec("trl") is None:
            return "TRL is not installed"
        if self.side.kind == "official rows" and "LLaVA" not in shape:
            return "mDPO's official way is here for LLaVA's inputs alone"
        if self.attention is not None and device.type != "cuda":
            return f"{'cuDNN' if self.attention == 'cudnn' else 'FlashAttention 3'} is for GPUs"
        if self.attention == "fa3" and not is_flash_attn_3_available():
            return "FlashAttention 3 is not installed"
        return None

    def prepared(self, model: Any) -> Any:
        """The model with the attention that is asked for."""
        if self.attention == "fa3":
            model.set_attn_implementation("flash_attention_3")
        return model

    @contextlib.contextmanager
    def kernels(self) -> Iterator[None]:
        """What a step runs under."""
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if self.attention == "cudnn" else contextlib.nullcontext():
            yield

    @property
    def reference(self) -> float:
        """Forwards of the reference that a step is charged with."""
        return 1 / EPOCHS if self.side.caches else 1.0

    def pictures(self, shown: int, distinct: int, branches: int) -> tuple[int, int]:
        """How many go through the vision tower in a step: for the policy, and for a forward of the reference.

        shown: pictures of a prompt. distinct: pictures of all of the record's branches.
        """
        if self.side.kind != OURS:
            return shown * branches, shown * branches
        options = self.side.options
        own = bool(options.get("own_vision"))
        policy = distinct * branches if own and not options.get("tree_packing", True) else distinct
        # A pass that fills the cache sees for itself.
        return policy, policy if own or self.side.caches else 0

    @property
    def packs(self) -> bool:
        return self.side.kind == OURS and bool(self.side.options.get("tree_packing", True))


def _ways(method: str) -> dict[str, Way]:
    loss: dict[str, Any] = {"loss_type": MDPO} if method == "mdpo" else {}
    off = {name: value for settings in WITHOUT.values() for name, value in settings.items()}
    found = {CHECKPOINTED: Way(side=ours(checkpointing=True, **loss)), OURS: Way(side=ours(**loss), worth=1)}
    if method == "dpo":
        found |= {
            f"{TRL}, checkpointing": Way(side=Side(kind="trl", checkpointing=True)),
            TRL: Way(side=Side(kind="trl"), worth=1),
            f"{TRL}, cuDNN's SDPA": Way(side=Side(kind="trl"), attention="cudnn", worth=2),
            f"{TRL}, FA3": Way(side=Side(kind="trl"), attention="fa3", worth=2),
        }
    else:
        found[OFFICIAL] = Way(side=Side(kind="official rows"), worth=2)
        found[f"{OFFICIAL}, checkpointing"] = Way(side=Side(kind="official rows", checkpointing=True), worth=1)
    for feature, settings in WITHOUT.items():
        found[f"{OURS}, without {feature}"] = Way(side=ours(**{**loss, **settings}), worth=3)
    found[WITHOUT_ALL] = Way(side=ours(**{**loss, **off}), worth=3)
    return found


WAYS = {method: _ways(method) for method in METHODS}
BASELINES = {"dpo": (TRL, WITHOUT_ALL), "mdpo": (OFFICIAL, WITHOUT_ALL)}
"""Whose seconds the others' are divided into: the first that was measured. A way with checkpointing is held to one with it."""
WEIGHED = {
    "dpo": (TRL, f"{TRL}, checkpointing", OURS, CHECKPOINTED),
    "mdpo": (OFFICIAL, f"{OFFICIAL}, checkpointing", OURS, CHECKPOINTED),
}
"""Whose memory is measured on the CPU, each in a process of its own. On a GPU every way's is."""


def baseline_of(method: str, way: str, measured: Collection[str]) -> str | None:
    """What `way` is compared with, of what was measured; None: nothing."""
    ending = ", checkpointing" if way.endswith(", checkpointing") else ""
    return next((f"{name}{ending}" for name in BASELINES[method] if f"{name}{ending}" in measured), None)


def in_turn(
    *, together: bool, shapes: Sequence[str] = tuple(SHAPES), methods: Sequence[str] = METHODS
) -> list[tuple[str, str, list[str]]]:
    """(shape, method, ways) of each race: all ways of a shape and method together, or each alone in order of worth."""
    if together:
        return [(shape, method, list(WAYS[method])) for shape in shapes for method in methods]
    alone = [(shape, method, name) for method in methods for shape in shapes for name in WAYS[method]]
    alone.sort(key=lambda case: METHODS.index(case[1]) * 2 + WAYS[case[1]][case[2]].worth // 2)
    return [(shape, method, [name]) for shape, method, name in alone]
