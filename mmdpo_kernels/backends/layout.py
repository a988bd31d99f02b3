"""How tensors lie in memory where kernels follow addresses, and the dtype that sums are made in."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where the inputs are float64."""
    return torch.promote_types(dtype, torch.float32)


def dense_heads(tensor: Tensor) -> Tensor:
    """The kernels read each head vector as consecutive elements; other strides may be anything."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def empty_head_last(like: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """(B, H, S, dim), in memory as (B, S, H, dim): what a model's next layer reads, and how projections make their outputs.

    dtype: that of `like` where it is None.
    """
    batch, heads, length, _ = like.shape
    return like.new_empty(batch, length, heads, dim, dtype=dtype).transpose(1, 2)


def int32(tensor: Tensor | None) -> Tensor | None:
    """As kernels read ids and positions."""
    return None if tensor is None else tensor.to(torch.int32).contiguous()
