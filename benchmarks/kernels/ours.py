"""This project's backends as contestants, each by its name and as `"auto"` chooses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.kernels.case import WITH_STATISTICS, WITHOUT_MASS, Contestant, Named, NotOfThisCase, Run, timed_run
from benchmarks.kernels.ops import attention_mass as mass_cases
from benchmarks.kernels.ops import linear_logprobs as head_cases
from benchmarks.kernels.ops import logit_rows as row_cases
from benchmarks.kernels.ops import preference_loss as loss_cases
from benchmarks.kernels.ops import tree_attention as tree_cases
from mmdpo_kernels import (
    SequenceLogps,
    TokenLogps,
    attention_mass,
    backends,
    linear_logprobs,
    preference_loss,
    tree_attention,
)
from mmdpo_kernels.backends.registry import load

BRANCHES = ("chosen", "rejected", "corrupted")
STATISTICS = ("entropy", "mean_logit", "is_top1")


def contestants(op: str) -> list[Contestant]:
    """Every backend of the op, and "auto"; for attention also what each costs without the ratios or the mass of a case."""
    if op == "logit_rows":
        return [_contestant(op, backend, _logit_rows, backend) for backend in ("triton", "native", "chunked")]
    found = [_contestant(op, backend, PREPARE[op], backend) for backend in ("auto", *backends()[op])]
    if op == "tree_attention":
        plain = partial(_tree_attention, with_mass=False)
        found += [_contestant(op, f"{c.name}{WITHOUT_MASS}", plain, c.name) for c in list(found)]
    if op == "linear_logprobs":
        found.append(_contestant(op, f"auto{WITH_STATISTICS}", partial(_linear_logprobs, stats=STATISTICS), "auto"))
    return found


def _contestant(op: str, name: str, prepare: Callable[[Any, str], Run], backend: str) -> Contestant:
    return Contestant(
        name=name,
        ours=True,
        prepare=lambda problem: prepare(problem, backend),
        unavailable_reason=partial(_unavailable_reason, op, backend),
    )


def _unavailable_reason(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    if backend == "auto":
        return None
    if backend == "triton" and device_type == "cpu":
        return "its kernels are only interpreted on the CPU, which says nothing about speed"
    module = load("linear_logprobs" if op == "logit_rows" else op, backend)
    reason: str | None = module.unavailable_reason(device_type, dtype)
    return reason


def _tree_attention(problem: tree_cases.Problem, backend: str, with_mass: bool = True) -> Run:
    if (not with_mass and not problem.num_segments) or (backend == "flex" and not problem.compiled):
        raise NotOfThisCase
    in_pass = problem.num_segments if with_mass and problem.rows is None else 0

    def forward() -> Named:
        for _ in range(problem.layers):
            found = tree_attention(
                problem.query,
                problem.key,
                problem.value,
                problem.tree_end,
                segments=problem.segments if in_pass else None,
                num_segments=in_pass,
                backend=backend,
            )
        named = {"output": found.output, "lse": found.lse}
        if in_pass:
            named["mass"] = found.mass
        if problem.rows is not None and with_mass:
            named["mass"] = attention_mass(
                problem.query[:, :, problem.rows],
                problem.key,
                problem.segments,
                row_positions=problem.rows[None],
                num_segments=problem.num_segments,
                tree_end=problem.tree_end,
                lse=found.lse[:, :, problem.rows],
                reduce="mean",
            )
        return named

    return timed_run(problem.timed, forward, problem.leaves, {"output": problem.grad_output})


def _attention_mass(problem: mass_cases.Problem, backend: str) -> Run:
    def forward() -> Named:
        mass = attention_mass(
            problem.query_rows,
            problem.key,
            problem.segments,
            row_positions=problem.row_positions,
            num_segments=problem.num_segments,
            lse=problem.lse,
            reduce=problem.reduce,
            backend=backend,
        )
        return {"mass": mass}

    return timed_run(problem.timed, forward, problem.leaves, {"mass": problem.grad_mass})


def _linear_logprobs(problem: head_cases.Problem, backend: str, stats: tuple[str, ...] = ()) -> Run:
    if backend == "reference":
        head_cases.require_products(problem)

    def forward() -> Named:
        found = linear_logprobs(
            problem.hidden,
            problem.weight,
            problem.targets,
            stats=stats,
            reference_hidden=problem.reference_hidden,
            backend=backend,
        )
        named = {"logps": found.logps}
        return named if found.reference_logps is None else {**named, "reference_logps": found.reference_logps}

    return timed_run(problem.timed, forward, problem.leaves, {"logps": problem.grad_logps})


def _logit_rows(problem: row_cases.Problem, backend: str) -> Run:
    if backend == "native" and problem.logits.device.type == "cpu":
        raise NotOfThisCase  # there the product and its rows are one kernel
    kernels, logits = load("logit_rows", backend), problem.logits.clone()

    def call() -> Named:
        logps, _ = kernels.fold_with_gradient(logits, problem.targets, row_cases.PLAIN, (), 1.0)
        return {"logps": logps, "coefficients": logits}

    return Run(call=call, results=lambda found: found)


def _preference_loss(problem: loss_cases.LossProblem | loss_cases.HeadProblem, backend: str) -> Run:
    forward = partial(_loss if isinstance(problem, loss_cases.LossProblem) else _head_and_loss, problem, backend)
    return timed_run(problem.timed, forward, problem.leaves, {"loss": torch.ones((), device=problem.leaves.popitem()[1].device)})


def _loss(problem: loss_cases.LossProblem, backend: str) -> Named:
    options: dict[str, Any] = {"loss_type": ("sigmoid", "copo", "ancpo"), "beta": loss_cases.BETA, "backend": backend}
    if problem.lengths is None:
        sums = (dict(zip(BRANCHES, logps.unbind(0), strict=True)) for logps in (problem.policy, problem.reference))
        policy, reference = (SequenceLogps(**fields) for fields in sums)
        return {"loss": preference_loss(policy, reference, **options).loss}
    tokens, base = (
        TokenLogps(logps=logps, lengths=problem.lengths, branches=BRANCHES) for logps in (problem.policy, problem.reference)
    )
    found = preference_loss(tokens, base, **options)
    rewards = {f"reward_{name}": values for name, values in found.rewards.items()}
    return {"loss": found.loss, **rewards, "accuracies": found.accuracies, "margins": found.margins}


def _head_and_loss(problem: loss_cases.HeadProblem, backend: str) -> Named:
    rows, reference, targets = map(problem.responses, (problem.hidden, problem.reference_hidden, problem.targets))
    found = linear_logprobs(rows.flatten(0, 1), problem.weight, targets.flatten(), reference_hidden=reference.flatten(0, 1))
    pairs = [
        SequenceLogps(chosen=chosen, rejected=rejected)
        for logps in (found.logps, found.reference_logps)
        if logps is not None
        for chosen, rejected in [logps.view(targets.shape).sum(-1).chunk(2)]
    ]
    return {"loss": preference_loss(*pairs, beta=loss_cases.BETA, backend=backend).loss}


PREPARE: dict[str, Callable[[Any, str], Run]] = {
    "tree_attention": _tree_attention,
    "attention_mass": _attention_mass,
    "linear_logprobs": _linear_logprobs,
    "preference_loss": _preference_loss,
}
