"""PyTorch's flash attention kernels, called directly because they return and take the log-sum-exp."""

from __future__ import annotations

import functools

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


def serves_groups(device_type: str) -> bool:
    """Whether several query heads may share a key head in one call."""
    return device_type != "cpu"


def forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(B, Hq, R, D), (B, H, S, D), (B, H, S, D) -> output (B, Hq, R, D), natural-log lse (B, Hq, R); Hq > H as `serves_groups` says."""
    if query.device.type == "cpu":
        tensors = _widened(query, key, value)
        output, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*tensors, 0.0, causal, scale=scale)
        return output.to(query.dtype), lse
    return _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)[:2]


def backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one rectangle.

    `output` and `lse` may belong to a softmax over more keys than these: the kernel computes P = exp(scores - lse) and
    dscores = P (dO V' - rowsum(dO output)), which is then the rectangle's exact share of the whole gradient.
    """
    if query.device.type == "cpu":
        tensors = _widened(grad_output, query, key, value, output)
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, lse, 0.0, causal, scale=scale)
        return tuple(grad.to(query.dtype) for grad in grads)
    unused = torch.empty(0, dtype=torch.int64, device=query.device)
    return _aten._scaled_dot_product_flash_attention_backward(
        grad_output,
        query,
        key,
        value,
        output,
        lse.contiguous(),  # the kernel knows no strides of it
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


def _widened(*tensors: Tensor) -> list[Tensor]:
    """In float32 where the CPU has no products of the dtype: emulated ones take ten times as long in backward."""
    return [tensor.float() if _emulated(tensor.dtype) else tensor for tensor in tensors]


@functools.cache
def _emulated(dtype: torch.dtype) -> bool:
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in supported and not supported[dtype]()
