"""transformers' own load-balancing loss, and its modules, without their roundings to float32."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.mixtral import modeling_mixtral

MOE_FAMILIES = ("qwen3_vl_moe", "qwen3_5_moe")
"""Families of `TINY` whose language model has experts and a load-balancing loss."""


class _Wide:
    """torch, whose float32 is float64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def transformers_loss(logits: tuple[torch.Tensor, ...], experts: int, top_k: int, mask: torch.Tensor | None) -> torch.Tensor:
    """`load_balancing_loss_func`, which adds up in float32, in float64."""
    own = modeling_mixtral.load_balancing_loss_func
    wide = types.FunctionType(own.__code__, {**own.__globals__, "torch": _Wide()}, argdefs=own.__defaults__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return wide(logits, experts, top_k, mask)  # type: ignore[no-any-return]


def widen_modules(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    """Let a model's modules, and its load-balancing loss, compute in float64 where they ask for float32."""
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for name in {
        type(module).__module__ for module in model.modules() if type(module).__module__.startswith("transformers.models.")
    }:
        patch.setattr(sys.modules[name], "torch", _Wide())
