"""Cases of the row kernels inside `linear_logprobs`: logits in, log-probabilities out, coefficients in the place of the logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernels.case import FORWARD, Case, Named, NotOfThisCase, Run, Work
from mmdpo_kernels.backends.chunked import logit_rows
from mmdpo_kernels.backends.logit_options import LogitOptions
from mmdpo_kernels.backends.registry import load

PLAIN = LogitOptions(None, 1.0, 1.0, -100)
BACKENDS = ("triton", "native", "chunked")
"""Those that have row kernels."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Logits that a kernel overwrites: the first call is on fresh ones, the clock does not care about the others'."""

    logits: Tensor  # (R, V)
    targets: Tensor  # (R,)
    timed: str = FORWARD

    @property
    def leaves(self) -> Named:
        return {}


def make(sizes: Mapping[str, int], device: torch.device, dtype: torch.dtype) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(sizes["rows"], sizes["vocabulary"], generator=generator, device=device, dtype=torch.float32)
    targets = torch.randint(sizes["vocabulary"], (sizes["rows"],), generator=generator, device=device)
    return Problem(logits=logits.to(dtype), targets=targets)


def prepare(problem: Problem, backend: str) -> Run:
    """One of our backends, or "auto", with the inputs of a case in hand."""
    if backend == "native" and problem.logits.device.type == "cpu":
        raise NotOfThisCase  # there the product and its rows are one kernel
    kernels, logits = load("logit_rows", backend), problem.logits.clone()

    def call() -> Named:
        logps, _ = kernels.fold_with_gradient(logits, problem.targets, PLAIN, (), 1.0)
        return {"logps": logps, "coefficients": logits}

    return Run(call=call, results=lambda found: found)


def work(problem: Problem) -> Work:
    """Each logit read once and written once."""
    return Work(flops=8.0 * problem.logits.numel(), bytes=2 * problem.logits.element_size() * problem.logits.numel())


def truth(problem: Problem) -> Named:
    """Plain PyTorch in float64."""
    logits = problem.logits.double()
    logps, _ = logit_rows.fold_with_gradient(logits, problem.targets, PLAIN, (), 1.0)
    return {"logps": logps, "coefficients": logits}


CASES = tuple(
    Case(
        op="logit_rows",
        name=f"rows_{rows}",
        why=f"log-probabilities and gradients of {rows:,} rows of 152,064 logits, in place",
        sizes={"cuda": {"rows": rows, "vocabulary": 152064}, "small": {"rows": 9, "vocabulary": 120}},
        make=make,
        work=work,
        truth=truth,
    )
    for rows in (200, 1024)
)
