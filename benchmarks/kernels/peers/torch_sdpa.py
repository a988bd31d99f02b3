"""`scaled_dot_product_attention` on the whole sequences of a tree as one causal batch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels.case import Contestant, Run
from benchmarks.kernels.ops.tree_attention import Problem
from benchmarks.kernels.peers.packages import anywhere
from benchmarks.kernels.peers.sequences import Attention, batched


def grouped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch serves the head groups."""
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def repeated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Key and value heads repeated first, as transformers does where PyTorch has no fast kernel for groups."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=True)


def cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """cuDNN's kernels, which PyTorch does not always prefer where they are fastest."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return grouped(query, key, value)


def _prepare(problem: Problem, function: Attention) -> Run:
    return batched(problem, function)


def _half_on_cuda(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cuda":
        return "it runs on cuda only"
    return None if dtype in (torch.float16, torch.bfloat16) else f"it takes float16 and bfloat16, not {dtype}"


CONTESTANTS = {
    "tree_attention": [
        Contestant(
            name=name, ours=False, prepare=partial(_prepare, function=function), unavailable_reason=reason, package="torch"
        )
        for name, function, reason in (
            ("SDPA, grouped heads", grouped, anywhere),
            ("SDPA, repeated heads", repeated, anywhere),
            ("SDPA, cuDNN", cudnn, _half_on_cuda),
        )
    ]
}
