"""`linear_logprobs` with rows of logits folded in C++: on the CPU a tile of the vocabulary at a time, on CUDA a chunk of rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..chunked.row_chunks import RowChunks
from . import linear_logprobs_cpu, logit_rows
from .extension import load

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_on_cuda = RowChunks(logit_rows)


def unavailable_reason(device_type: str, dtype: torch.dtype, **features: object) -> str | None:
    """Why this backend cannot serve the call, or None."""
    if device_type == "cuda":
        return logit_rows.unavailable_reason(device_type, dtype)
    native = load()
    if isinstance(native, str):
        return native
    if device_type != "cpu":
        return f"it runs on cpu and cuda tensors, got {device_type}"
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, got {dtype}"
    try:
        native.cpu_level()
    except ValueError as error:
        return str(error)
    return None


def forward(hidden: Tensor, *arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """As `RowChunks.forward`."""
    return _of(hidden).forward(hidden, *arguments)  # type: ignore[no-any-return]


def forward_with_gradient(hidden: Tensor, *arguments: Any) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """As `RowChunks.forward_with_gradient`."""
    return _of(hidden).forward_with_gradient(hidden, *arguments)  # type: ignore[no-any-return]


def logit_dtype(hidden: Tensor) -> torch.dtype:
    """As `RowChunks.logit_dtype`."""
    return _of(hidden).logit_dtype(hidden)  # type: ignore[no-any-return]


def empty_kept(hidden: Tensor, weight: Tensor) -> list[Tensor]:
    """As `RowChunks.empty_kept`."""
    return _of(hidden).empty_kept(hidden, weight)  # type: ignore[no-any-return]


def backward_kept(grad_logps: Tensor, *arguments: Any) -> tuple[Tensor | None, Tensor | None]:
    """As `RowChunks.backward_kept`."""
    return _of(grad_logps).backward_kept(grad_logps, *arguments)  # type: ignore[no-any-return]


def backward(grad_logps: Tensor, *arguments: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `RowChunks.backward`."""
    return _of(grad_logps).backward(grad_logps, *arguments)  # type: ignore[no-any-return]


def _of(tensor: Tensor) -> Any:
    return linear_logprobs_cpu if tensor.device.type == "cpu" else _on_cuda
