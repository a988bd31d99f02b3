"""flash-colreduce: column sums of attention, one key head a query head, no backward."""

from __future__ import annotations

from benchmarks.kernels.case import Contestant, Named, NotOfThisCase, Run, timed_run
from benchmarks.kernels.ops.attention_mass import Problem
from benchmarks.kernels.peers.packages import needs


def _attention_mass(problem: Problem) -> Run:
    if problem.reduce != "tokens":
        raise NotOfThisCase
    from flash_colreduce import flash_colreduce

    groups = problem.query_rows.shape[1] // problem.key.shape[1]

    def forward() -> Named:
        key = problem.key.repeat_interleave(groups, dim=1)
        # Its causal mask is aligned to the last key, as these rows are.
        sums = flash_colreduce(problem.query_rows, key, reduction="sum", is_causal=True)
        return {"mass": sums.float().mean(1) / problem.query_rows.shape[2]}

    return timed_run(problem.timed, forward, problem.leaves, {"mass": problem.grad_mass})


CONTESTANTS = {
    "attention_mass": [
        Contestant(
            name="flash-colreduce",
            ours=False,
            prepare=_attention_mass,
            unavailable_reason=needs("flash_colreduce", half=True),
            package="flash-colreduce",
        )
    ]
}
