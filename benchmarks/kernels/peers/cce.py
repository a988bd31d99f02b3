"""Cut cross-entropy: per-row losses, three products with a frozen head; how fast depends on how peaked the hidden states are."""

from __future__ import annotations

from benchmarks.kernels.case import Contestant, Named, NotOfThisCase, Run, timed_run
from benchmarks.kernels.ops.linear_logprobs import Problem
from benchmarks.kernels.peers.packages import needs


def _linear_logprobs(problem: Problem) -> Run:
    if problem.reference_hidden is not None:
        raise NotOfThisCase
    from cut_cross_entropy import linear_cross_entropy

    def forward() -> Named:
        return {"logps": -linear_cross_entropy(problem.hidden, problem.weight, problem.targets, reduction="none")}

    return timed_run(problem.timed, forward, problem.leaves, {"logps": problem.grad_logps})


CONTESTANTS = {
    "linear_logprobs": [
        Contestant(
            name="CCE",
            ours=False,
            prepare=_linear_logprobs,
            unavailable_reason=needs("cut_cross_entropy", half=True),
            package="cut-cross-entropy",
        )
    ]
}
