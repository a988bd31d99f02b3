"""FlexAttention with the tree rule as its mask, compiled: prefix sharing as dpo-prefix-sharing does it."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.kernels.case import Contestant, Named, NotOfThisCase, Run, timed_run
from benchmarks.kernels.ops.tree_attention import Problem
from benchmarks.kernels.peers.packages import needs


def _tree_attention(problem: Problem) -> Run:
    if not problem.compiled:
        raise NotOfThisCase
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = problem.query.shape[2]
    ends = torch.full((length,), length, device=problem.query.device) if problem.tree_end is None else problem.tree_end[0]

    def rule(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (row < ends[column])

    # A model makes the mask once for all layers.
    mask = create_block_mask(rule, None, None, length, length, device=problem.query.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def forward() -> Named:
        for _ in range(problem.layers):
            output = compiled(problem.query, problem.key, problem.value, block_mask=mask, enable_gqa=True)
        return {"output": output}

    return timed_run(problem.timed, forward, problem.leaves, {"output": problem.grad_output})


CONTESTANTS = {
    "tree_attention": [
        Contestant(
            name="FlexAttention",
            ours=False,
            prepare=_tree_attention,
            # On the CPU it has no backward.
            unavailable_reason=needs("torch.nn.attention.flex_attention"),
            package="torch",
        )
    ]
}
