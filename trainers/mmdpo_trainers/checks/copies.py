"""The model in other states, with nothing left behind: patched for a moment, or a second one on the same weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmdpo_kernels import patch_model, unpatch_model
from mmdpo_kernels.patched import language_tower


@contextmanager
def patched(model: Any) -> Iterator[Any]:
    """The model patched while the block runs."""
    try:
        yield patch_model(model)
    finally:
        unpatch_model(model)


@contextmanager
def copy_of(model: Any) -> Iterator[Any]:
    """A second model whose parameters are the model's own, so it takes no memory; modules and configurations are its own.

    What requires a gradient is put back afterwards, and gradients are dropped.
    """
    parameters = list(model.parameters())
    required = [parameter.requires_grad for parameter in parameters]
    try:
        yield copy.deepcopy(model, {id(parameter): parameter for parameter in parameters})
    finally:
        for parameter, before in zip(parameters, required, strict=True):
            parameter.requires_grad_(before)
            parameter.grad = None


@contextmanager
def softcapped(model: Any) -> Iterator[None]:
    """transformers' own attention with the softcap that the model was trained with, while the block runs.

    Some versions run such models by PyTorch's attention, which leaves the softcap out; a patched model has it, and eager attention too.
    """
    tower = language_tower(model)
    before = tower.config._attn_implementation
    left_out = before == "sdpa" and getattr(tower.config, "attn_logit_softcapping", None) is not None
    if left_out:
        tower.set_attn_implementation("eager")
    try:
        yield
    finally:
        if left_out:
            tower.set_attn_implementation(before)
