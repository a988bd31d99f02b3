"""Runs of attention functions that know nothing of trees: they get the whole sequences, and their results are folded back."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.kernels.case import Named, Run, timed_run
from benchmarks.kernels.ops.tree_attention import Problem

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def batched(problem: Problem, attention: Attention) -> Run:
    """attention: query (N, Hq, L, D), key, value -> output of the same shape; causal."""
    leaves, grad = problem.sequences()

    def forward() -> Named:
        for _ in range(problem.layers):
            output = attention(*leaves.values())
        return {"output": output}

    return timed_run(problem.timed, forward, leaves, {"output": grad}, problem.packed)


def packed_rows(problem: Problem, attention: Attention) -> Run:
    """attention: query (N L, Hq, D), key, value -> output of the same shape; causal within each of the N sequences."""
    shaped, grad = problem.sequences()
    leaves = {name: _rows(tensor.detach()).requires_grad_() for name, tensor in shaped.items()}
    count, length = problem.paths.shape

    def forward() -> Named:
        for _ in range(problem.layers):
            output = attention(*leaves.values())
        return {"output": output}

    def results(found: Named) -> Named:
        return problem.packed({name: tensor.unflatten(0, (count, length)).transpose(1, 2) for name, tensor in found.items()})

    return timed_run(problem.timed, forward, leaves, {"output": _rows(grad)}, results)


def _rows(tensor: Tensor) -> Tensor:
    """(N, H, L, D) -> (N L, H, D)."""
    return tensor.transpose(1, 2).flatten(0, 1).contiguous()
