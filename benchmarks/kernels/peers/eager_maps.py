"""The usual way to attention ratios: eager attention that gives out every layer's map (`output_attentions=True`), then sums over it."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.kernels.case import CannotServe, Contestant, Named, NotOfThisCase, Run, timed_run
from benchmarks.kernels.ops.tree_attention import Problem
from benchmarks.kernels.peers.packages import anywhere
from benchmarks.kernels.peers.torch_dense import MOST_SCORES


def _tree_attention(problem: Problem) -> Run:
    if problem.rows is None:
        raise NotOfThisCase
    heads, length = problem.query.shape[1:3]
    if heads * length**2 > MOST_SCORES:
        raise CannotServe(f"maps of {heads} x {length} x {length} are not held")
    query, key, value = problem.leaves.values()
    least = torch.finfo(query.dtype).min
    mask = torch.full((length, length), least, dtype=query.dtype, device=query.device).triu(1)

    def layer() -> tuple[Tensor, Tensor]:
        """transformers' `eager_attention_forward`."""
        keys, values = (tensor.repeat_interleave(problem.kv_groups, dim=1) for tensor in (key, value))
        scores = query @ keys.mT * problem.scale + mask
        probabilities = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        return probabilities @ values, probabilities

    def forward() -> Named:
        for _ in range(problem.layers):
            # transformers can be told to keep the map of one layer only, which is fairer than the default.
            output, maps = layer()
        shares = maps[0].mean(0)[problem.rows].float().mean(0)
        mass = [shares[problem.segments[0] == picture].sum() for picture in range(problem.num_segments)]
        return {"output": output, "mass": torch.stack(mass)[None]}

    return timed_run(problem.timed, forward, problem.leaves, {"output": problem.grad_output})


CONTESTANTS = {
    "tree_attention": [
        Contestant(name="eager maps", ours=False, prepare=_tree_attention, unavailable_reason=anywhere, package="torch")
    ]
}
