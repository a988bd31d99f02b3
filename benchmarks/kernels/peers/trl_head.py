"""TRL's chunked head (`trl.kernels`), alone and with what its `DPOTrainer` asks of it, followed by DPO written out."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from benchmarks.kernels.case import WITH_STATISTICS, Contestant, Named, NotOfThisCase, Run, timed_run
from benchmarks.kernels.ops import linear_logprobs, preference_loss
from benchmarks.kernels.peers.packages import needs

# What TRL passes.
CHUNK = 32768


def _logps(hidden: Tensor, weight: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, CHUNK, None, 1.0, outputs)[0]


def _linear_logprobs(problem: linear_logprobs.Problem, outputs: tuple[str, ...]) -> Run:
    def forward() -> Named:
        found = {"logps": _logps(problem.hidden, problem.weight, problem.targets, outputs)}
        if problem.reference_hidden is not None:
            with torch.no_grad():
                found["reference_logps"] = _logps(problem.reference_hidden, problem.weight, problem.targets, outputs)
        return found

    return timed_run(problem.timed, forward, problem.leaves, {"logps": problem.grad_logps})


def _preference_loss(problem: preference_loss.LossProblem | preference_loss.HeadProblem) -> Run:
    if isinstance(problem, preference_loss.LossProblem):
        raise NotOfThisCase

    def sums(hidden: Tensor) -> Tensor:
        rows, targets = problem.responses(hidden), problem.responses(problem.targets)
        return _logps(rows.flatten(0, 1), problem.weight, targets.flatten(), ()).view(targets.shape).sum(-1)

    def forward() -> Named:
        with torch.no_grad():
            reference = sums(problem.reference_hidden)
        chosen, rejected = (sums(problem.hidden) - reference).chunk(2)
        return {"loss": -logsigmoid(preference_loss.BETA * (chosen - rejected)).mean()}

    return timed_run(problem.timed, forward, problem.leaves, {"loss": torch.ones((), device=problem.hidden.device)})


_available = partial(Contestant, ours=False, unavailable_reason=needs("trl.kernels", ("cpu", "cuda")), package="trl")
CONTESTANTS = {
    "linear_logprobs": [
        _available(name="TRL head", prepare=partial(_linear_logprobs, outputs=())),
        _available(
            name=f"TRL head{WITH_STATISTICS}",
            prepare=partial(_linear_logprobs, outputs=("entropy", "mean_logits", "is_top1")),
        ),
    ],
    "preference_loss": [_available(name="TRL head + DPO", prepare=_preference_loss)],
}
