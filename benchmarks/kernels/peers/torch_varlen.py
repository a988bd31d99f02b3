"""PyTorch's variable-length flash attention on the whole sequences of a tree."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from benchmarks.kernels.case import Contestant, Run
from benchmarks.kernels.ops.tree_attention import Problem
from benchmarks.kernels.peers.packages import needs
from benchmarks.kernels.peers.sequences import packed_rows


def _tree_attention(problem: Problem) -> Run:
    from torch.nn.attention.varlen import varlen_attn

    count, length = problem.paths.shape
    starts = torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=problem.query.device)
    known = inspect.signature(varlen_attn).parameters
    # PyTorch 2.10 said is_causal; window_size came after it, and grouped heads with it.
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    grouped = {"enable_gqa": True} if "enable_gqa" in known else {}

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not grouped:
            key, value = (tensor.repeat_interleave(problem.kv_groups, dim=1) for tensor in (key, value))
        return varlen_attn(query, key, value, starts, starts, length, length, **causal, **grouped)

    return packed_rows(problem, attention)


CONTESTANTS = {
    "tree_attention": [
        Contestant(
            name="torch varlen",
            ours=False,
            prepare=_tree_attention,
            unavailable_reason=needs("torch.nn.attention.varlen", half=True),
            package="torch",
        )
    ]
}
