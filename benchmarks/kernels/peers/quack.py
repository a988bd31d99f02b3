"""QuACK's chunked linear cross-entropy: a scalar only, so its gradients are compared and not its log-probabilities."""

from __future__ import annotations

import torch

from benchmarks.kernels.case import CannotServe, Contestant, Named, NotOfThisCase, Run, timed_run
from benchmarks.kernels.ops.linear_logprobs import Problem
from benchmarks.kernels.peers.packages import needs


def _linear_logprobs(problem: Problem) -> Run:
    if problem.reference_hidden is not None:
        raise NotOfThisCase
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    if not problem.trainable:
        raise CannotServe("it is measured with a trained head, which its one pass is made for")

    def forward() -> Named:
        loss = chunked_linear_cross_entropy(problem.hidden, problem.weight, problem.targets, reduction="sum")
        return {"sum": -loss}

    upstream = {"sum": torch.ones((), device=problem.hidden.device)}
    return timed_run(problem.timed, forward, problem.leaves, upstream)


CONTESTANTS = {
    "linear_logprobs": [
        Contestant(
            name="QuACK",
            ours=False,
            prepare=_linear_logprobs,
            unavailable_reason=needs("quack.linear_cross_entropy", half=True),
            package="quack-kernels",
        )
    ]
}
