"""Cases of `linear_logprobs`: the head of a language model over the rows that are scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.kernels.case import BOTH, WITH_STATISTICS, CannotServe, Case, Named, Run, Work, timed_run
from mmdpo_kernels import linear_logprobs
from mmdpo_kernels.backends.logit_options import LogitOptions
from mmdpo_kernels.backends.reference import linear_logprobs as reference

if TYPE_CHECKING:
    from benchmarks.kernels.choose_backends import Inputs, Setting

Sizes = Mapping[str, int]
CHOICE_VOCABULARY = 32064
STATISTICS = ("entropy", "mean_logit", "is_top1")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Inputs of one case; every row has a target."""

    hidden: Tensor  # (T, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (T,)
    grad_logps: Tensor  # (T,)
    trainable: bool
    """The head is trained too."""
    reference_hidden: Tensor | None = None
    """(T, H) of the reference, under the same head and with the same targets."""
    timed: str = BOTH

    @property
    def leaves(self) -> Named:
        return {"hidden": self.hidden, "weight": self.weight} if self.trainable else {"hidden": self.hidden}


def peaked(rows: int, weight: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
    """(T, H) hidden states whose targets are likely, as a trained model's are: some implementations skip what is unlikely."""
    noise = torch.randn(rows, weight.shape[1], generator=generator, device=weight.device)
    return weight[targets].float() * 12 + noise


def make(*, trainable: bool, with_reference: bool) -> Callable[[Sizes, torch.device, torch.dtype], Problem]:
    """A maker of problems."""

    def make_problem(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
        # On a GPU the GPU's own numbers: a CPU would need seconds for those of a weight.
        on = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        weight = (torch.randn(sizes["vocabulary"], sizes["width"], **on) * sizes["width"] ** -0.5).to(dtype)
        targets = torch.randint(sizes["vocabulary"], (sizes["rows"],), **on)
        hidden = peaked(sizes["rows"], weight, targets, on["generator"])
        nearby = hidden + 0.05 * torch.randn(hidden.shape, **on)
        return Problem(
            hidden=hidden.to(device, dtype).requires_grad_(),
            weight=weight.to(device).requires_grad_(trainable),
            targets=targets.to(device),
            # One sign for all: libraries that return a sum only can be compared.
            grad_logps=torch.ones(sizes["rows"], device=device),
            trainable=trainable,
            reference_hidden=nearby.to(device, dtype) if with_reference else None,
        )

    return make_problem


def require_products(problem: Problem) -> None:
    """For contestants that leave half-precision products to PyTorch.

    Raises:
        CannotServe: on a CPU without instructions for them, where its product of probabilities and weight takes minutes.
    """
    hidden = problem.hidden
    slow = hidden.dtype in (torch.bfloat16, torch.float16) and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if hidden.device.type == "cpu" and slow and hidden.shape[0] > 50:
        raise CannotServe("PyTorch's own product in half precision takes minutes on this CPU")


def prepare(problem: Problem, backend: str, stats: tuple[str, ...] = ()) -> Run:
    """One of our backends, or "auto", with the inputs of a case in hand."""
    if backend == "reference":
        require_products(problem)

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


def choice_kinds(device: str, *, mass: bool) -> Iterator[dict[str, bool]]:
    """What `choose_backends` tells apart, nothing on a GPU. The op does not report whether a gradient is wanted; in training it is."""
    if device == "cpu":
        yield {"tree": False}


def choice_call(setting: Setting, inputs: Inputs) -> Callable[[str], Any]:
    """The call as a function of the backend's name: the rows of two responses under a frozen head as wide as all heads."""
    rows = 2 * setting.response
    hidden = inputs.heads(setting.heads, rows).detach().transpose(1, 2).reshape(rows, -1)
    problem = Problem(
        hidden=hidden.requires_grad_(),
        weight=(torch.randn(CHOICE_VOCABULARY, hidden.shape[1]) * hidden.shape[1] ** -0.5).to(hidden.dtype),
        targets=torch.arange(rows),
        grad_logps=torch.ones(rows),
        trainable=False,
    )
    return lambda backend: prepare(problem, backend).call()


def work(problem: Problem) -> Work:
    """One product of rows and head in forward, one in backward a gradient."""
    rows, width = problem.hidden.shape
    size = problem.hidden.element_size()
    products = 3 if problem.trainable or problem.reference_hidden is not None else 2
    moved = size * (2 * problem.hidden.numel() + problem.weight.numel() * (2 if problem.trainable else 1))
    return Work(flops=products * 2 * rows * width * problem.weight.shape[0], bytes=moved)


def truth(problem: Problem) -> Named:
    """The reference in float64, some rows at a time."""
    weight, options = problem.weight.detach().double(), LogitOptions(None, 1.0, 1.0, -100)
    logps, grad_hidden, grad_weight = [], [], torch.zeros_like(weight) if problem.trainable else None
    for rows in torch.arange(problem.targets.shape[0]).split(512):
        hidden, targets = problem.hidden.detach()[rows].double(), problem.targets[rows]
        logps.append(reference.forward(hidden, weight, targets, None, options, ())[0])
        needs = (True, problem.trainable, False)
        up = problem.grad_logps[rows].double()
        part, of_weight, _ = reference.backward(up, hidden, weight, targets, None, options, needs)
        grad_hidden.append(part)
        if grad_weight is not None:
            grad_weight += of_weight
    found = {"logps": torch.cat(logps), "grad_hidden": torch.cat(grad_hidden)}
    if problem.reference_hidden is not None:
        hidden = problem.reference_hidden.double()
        found["reference_logps"] = reference.forward(hidden, weight, problem.targets, None, options, ())[0]
    return found if grad_weight is None else {**found, "grad_weight": grad_weight}


SMALL = {"rows": 9, "width": 32, "vocabulary": 120}


def _case(
    name: str,
    why: str,
    sizes: Mapping[str, Sizes],
    *,
    trainable: bool = False,
    with_reference: bool = False,
    dtype: torch.dtype | None = None,
) -> Case:
    return Case(
        op="linear_logprobs",
        name=name,
        why=why,
        sizes=sizes,
        make=make(trainable=trainable, with_reference=with_reference),
        work=work,
        truth=truth,
        timed=BOTH,
        dtype=dtype,
    )


def _on_cpu() -> list[Case]:
    """A frozen head of a small model on a CPU: few and many rows, a small and a large vocabulary, in both dtypes."""
    return [
        _case(
            f"frozen_{round(vocabulary / 1000)}k_{rows}{suffix}",
            f"{rows:,} response rows under a frozen head of {vocabulary:,} tokens",
            {"cpu": {"rows": rows, "width": 1024, "vocabulary": vocabulary}, "small": SMALL},
            dtype=dtype,
        )
        for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, "_bf16"))
        for vocabulary in (32064, 151936)
        for rows in (200, 1000)
    ]


def _on_cuda() -> list[Case]:
    """A frozen head of a 7B model: a pair's response rows, and as many as a long batch has."""
    return [
        _case(
            f"frozen_{rows}",
            f"{rows:,} response rows under a frozen head of 152,064 tokens",
            {"cuda": {"rows": rows, "width": 3584, "vocabulary": 152064}, "small": SMALL},
        )
        for rows in (200, 1000, 8192)
    ]


CASES = (
    *_on_cpu(),
    *_on_cuda(),
    _case(
        "with_reference",
        "policy and reference under one frozen head, the response rows of a pair each",
        {
            "cuda": {"rows": 200, "width": 3584, "vocabulary": 152064},
            "cpu": {"rows": 200, "width": 1024, "vocabulary": 32064},
            "small": SMALL,
        },
        with_reference=True,
    ),
    _case(
        "trainable",
        "a head that is trained; on a GPU at the size at which others publish",
        {
            "cuda": {"rows": 4096, "width": 4096, "vocabulary": 128256},
            "cpu": {"rows": 200, "width": 1024, "vocabulary": 32064},
            "small": SMALL,
        },
        trainable=True,
    ),
)

VARIANTS = {WITH_STATISTICS: (partial(prepare, stats=STATISTICS), ("auto",))}
"""What a name ends in -> what is prepared instead, and for which backends; None: all."""
COMPILED = (("frozen_200", "with_reference", "trainable"),)
"""Cases that a GPU run compiles ahead of timing, a process for each group."""
