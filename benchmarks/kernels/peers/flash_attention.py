"""FlashAttention 2, 3 and 4 on the whole sequences of a tree, one variable-length call."""

from __future__ import annotations

import importlib
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.case import Contestant, Run
from benchmarks.kernels.ops.tree_attention import Problem
from benchmarks.kernels.peers.packages import needs
from benchmarks.kernels.peers.sequences import packed_rows


def _tree_attention(problem: Problem, module: str, with_lengths: bool) -> Run:
    function = importlib.import_module(module).flash_attn_varlen_func
    count, length = problem.paths.shape
    starts = torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=problem.query.device)
    ranges = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    if with_lengths:
        ranges |= {"max_seqlen_q": length, "max_seqlen_k": length}

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = function(query, key, value, **ranges, causal=True)
        return output[0] if isinstance(output, tuple) else output

    return packed_rows(problem, attention)


CONTESTANTS = {
    "tree_attention": [
        Contestant(
            name=name,
            ours=False,
            prepare=partial(_tree_attention, module=module, with_lengths=with_lengths),
            unavailable_reason=needs(module, half=True),
            package=package,
        )
        for name, module, with_lengths, package in (
            ("FlashAttention 2", "flash_attn.flash_attn_interface", True, "flash-attn"),
            ("FlashAttention 3", "flash_attn_interface", True, "flash-attn-3"),
            ("FlashAttention 4", "flash_attn.cute", False, "flash-attn-4"),
        )
    ]
}
