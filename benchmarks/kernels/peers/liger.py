"""Liger's fused linear DPO loss, which takes every row that the model leaves.

Compiled on CUDA as shipped; uncompiled on the CPU, where its products are all that counts.
"""

from __future__ import annotations

import torch

from benchmarks.kernels.case import Contestant, Named, NotOfThisCase, Run, timed_run
from benchmarks.kernels.ops.preference_loss import BETA, HeadProblem, LossProblem
from benchmarks.kernels.peers.packages import needs


def _preference_loss(problem: LossProblem | HeadProblem) -> Run:
    if isinstance(problem, LossProblem):
        raise NotOfThisCase
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    function = LigerFusedLinearDPOLoss(beta=BETA, compiled=problem.hidden.device.type == "cuda")

    def forward() -> Named:
        loss, *_ = function(
            problem.weight,
            problem.hidden,
            problem.targets,
            None,
            problem.reference_hidden,
            problem.weight,
        )
        return {"loss": loss}

    return timed_run(problem.timed, forward, problem.leaves, {"loss": torch.ones((), device=problem.hidden.device)})


CONTESTANTS = {
    "preference_loss": [
        Contestant(
            name="Liger fused DPO",
            ours=False,
            prepare=_preference_loss,
            unavailable_reason=needs("liger_kernel.chunked_loss", ("cpu", "cuda")),
            package="liger-kernel",
        )
    ]
}
