"""PyTorch's flash attention kernels, called directly because they return and take the log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

_aten = torch.ops.aten


def unavailable_reason(device_type: str, dtype: torch.dtype, head_dim: int = 64) -> str | None:
    """Why no flash kernel of this PyTorch serves the device, dtype and head dim, or None."""
    if device_type == "cpu":
        return None
    if device_type == "cuda":
        if dtype not in (torch.float16, torch.bfloat16):
            return f"PyTorch's flash attention takes float16 and bfloat16 on CUDA, not {dtype}"
        if head_dim % 8 or head_dim > 256:
            return f"PyTorch's flash attention takes head dims up to 256 that are multiples of 8 on CUDA, not {head_dim}"
        return None
    return f"no flash attention with log-sum-exp for device '{device_type}'"


def forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(B, H, R, D), (B, H, S, D), (B, H, S, D) -> output (B, H, R, D), natural-log lse (B, H, R)."""
    if query.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    return _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)[:2]


def backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one rectangle.

    `output` and `lse` may belong to a softmax over more keys than these: the kernel computes P = exp(scores - lse) and
    dscores = P (dO V' - rowsum(dO output)), which is then the rectangle's exact share of the whole gradient.
    """
    if query.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_output, query, key, value, output, lse, 0.0, causal, scale=scale
        )
    unused = torch.empty(0, dtype=torch.int64, device=query.device)
    return _aten._scaled_dot_product_flash_attention_backward(
        grad_output,
        query,
        key,
        value,
        output,
        lse,
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        causal,
        unused,
        unused,
        scale=scale,
    )
