"""FlashAttention 2, 3 and 4 on the whole sequences of a tree, one variable-length call; 3 also as the Hub has it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.case import Contestant, Run
from benchmarks.kernels.ops.tree_attention import Problem
from benchmarks.kernels.peers.packages import needs
from benchmarks.kernels.peers.sequences import packed_rows
from mmdpo_kernels.backends.varlen import from_hub


def _tree_attention(problem: Problem, module: Callable[[], Any], with_lengths: bool) -> Run:
    function = module().flash_attn_varlen_func
    count, length = problem.paths.shape
    starts = torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=problem.query.device)
    ranges = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    if with_lengths:
        ranges |= {"max_seqlen_q": length, "max_seqlen_k": length}

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = function(query, key, value, **ranges, causal=True)
        return output[0] if isinstance(output, tuple) else output

    return packed_rows(problem, attention)


def _not_of_the_hub(device_type: str, dtype: torch.dtype) -> str | None:
    return needs("kernels", half=True)(device_type, dtype) or from_hub.missing(from_hub.FLASH_3)


CONTESTANTS = {
    "tree_attention": [
        *(
            Contestant(
                name=name,
                ours=False,
                prepare=partial(_tree_attention, module=partial(importlib.import_module, module), with_lengths=with_lengths),
                unavailable_reason=needs(module, half=True),
                package=package,
            )
            for name, module, with_lengths, package in (
                ("FlashAttention 2", "flash_attn.flash_attn_interface", True, "flash-attn"),
                ("FlashAttention 3", "flash_attn_interface", True, "flash-attn-3"),
                ("FlashAttention 4", "flash_attn.cute", False, "flash-attn-4"),
            )
        ),
        Contestant(
            name="FlashAttention 3 of the Hub",
            ours=False,
            prepare=partial(_tree_attention, module=partial(from_hub.interface, from_hub.FLASH_3), with_lengths=True),
            unavailable_reason=_not_of_the_hub,
            package="kernels",
        ),
    ]
}
