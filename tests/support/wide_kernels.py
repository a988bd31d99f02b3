"""transformers' Gated DeltaNet in float64, for tests: its kernels and norms compute in float32 whatever the model's dtype."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch


class _Wide:
    """torch, but that float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def widen_kernels(monkeypatch: pytest.MonkeyPatch, *model_types: str) -> None:
    """Let the modules of these models round nothing to float32, patched and unpatched alike, until the test ends."""
    for name in model_types:
        monkeypatch.setattr(sys.modules[f"transformers.models.{name}.modeling_{name}"], "torch", _Wide())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
