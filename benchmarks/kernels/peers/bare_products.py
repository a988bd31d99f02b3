"""The two matrix products of a frozen head and nothing else: coefficients of the second are made before the clock starts."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.kernels.case import Contestant, Named, NotOfThisCase, Run, multiplies_bfloat16
from benchmarks.kernels.ops.linear_logprobs import Problem
from benchmarks.kernels.peers.packages import anywhere
from mmdpo_kernels.backends.chunked import logit_rows
from mmdpo_kernels.backends.logit_options import LogitOptions

NAME = "two bare products"


def _linear_logprobs(problem: Problem, dtype: torch.dtype | None) -> Run:
    # PyTorch's half-precision products take minutes on a CPU without instructions for them: there float32 ones are what can be had.
    given = problem.weight.dtype
    widened = (
        problem.weight.device.type == "cpu" and given != torch.float32 and not (given == torch.bfloat16 and multiplies_bfloat16())
    )
    if problem.trainable or problem.reference_hidden is not None or (dtype is not None) != widened:
        raise NotOfThisCase
    hidden, weight = (tensor.detach().to(dtype or tensor.dtype) for tensor in (problem.hidden, problem.weight))
    coefficients = hidden @ weight.T
    logit_rows.fold_with_gradient(coefficients, problem.targets, LogitOptions(None, 1.0, 1.0, -100), (), 1.0)

    def call() -> Named:
        logits = hidden @ weight.T
        return {"grad_hidden": coefficients @ weight, "_logits": logits}

    return Run(call=call, results=lambda found: {"grad_hidden": found["grad_hidden"]})


_available = partial(Contestant, ours=False, unavailable_reason=anywhere, package="torch")
CONTESTANTS = {
    "linear_logprobs": [
        _available(name=NAME, prepare=partial(_linear_logprobs, dtype=None)),
        _available(name=f"{NAME} in float32", prepare=partial(_linear_logprobs, dtype=torch.float32)),
    ]
}
