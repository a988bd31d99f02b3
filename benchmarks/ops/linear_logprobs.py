"""Cases of `linear_logprobs`: the head of a language model over the rows that are scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.case import BOTH, Case, Named, Work
from mmdpo_kernels.backends.reference import linear_logprobs as reference

Sizes = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Inputs of one case; every row has a target."""

    hidden: Tensor  # (T, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (T,)
    grad_logps: Tensor  # (T,)
    trainable: bool
    """The head is trained too."""
    timed: str = BOTH

    @property
    def leaves(self) -> Named:
        return {"hidden": self.hidden, "weight": self.weight} if self.trainable else {"hidden": self.hidden}


def peaked(rows: int, weight: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
    """(T, H) hidden states whose targets are likely, as a trained model's are: some implementations skip what is unlikely."""
    noise = torch.randn(rows, weight.shape[1], generator=generator)
    return weight[targets].cpu().float() * 12 + noise


def make(*, trainable: bool) -> Callable[[Sizes, torch.device, torch.dtype], Problem]:
    """A maker of problems."""

    def make_problem(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
        generator = torch.Generator().manual_seed(0)
        weight = (torch.randn(sizes["vocabulary"], sizes["width"], generator=generator) * sizes["width"] ** -0.5).to(dtype)
        targets = torch.randint(sizes["vocabulary"], (sizes["rows"],), generator=generator)
        hidden = peaked(sizes["rows"], weight, targets, generator)
        return Problem(
            hidden=hidden.to(device, dtype).requires_grad_(),
            weight=weight.to(device).requires_grad_(trainable),
            targets=targets.to(device),
            # One sign for all: libraries that return a sum only can be compared.
            grad_logps=torch.ones(sizes["rows"], device=device),
            trainable=trainable,
        )

    return make_problem


def work(problem: Problem) -> Work:
    """One product of rows and head in forward, one in backward a gradient."""
    rows, width = problem.hidden.shape
    size = problem.hidden.element_size()
    products = 3 if problem.trainable else 2
    moved = size * (2 * problem.hidden.numel() + problem.weight.numel() * (2 if problem.trainable else 1))
    return Work(flops=products * 2 * rows * width * problem.weight.shape[0], bytes=moved)


def truth(problem: Problem) -> Named:
    """The reference in float64."""
    hidden, weight = problem.hidden.detach().double(), problem.weight.detach().double()
    options = (None, None, 1.0, 1.0, -100)
    logps, _ = reference.forward(hidden, weight, problem.targets, *options, ())
    needs = (True, problem.trainable, False)
    grads = reference.backward(problem.grad_logps.double(), hidden, weight, problem.targets, *options, needs)
    return {"logps": logps} | {
        f"grad_{name}": grad for name, grad in zip(problem.leaves, grads, strict=False) if grad is not None
    }


SMALL = {"rows": 9, "width": 32, "vocabulary": 120}


def _case(name: str, why: str, sizes: Mapping[str, Sizes], *, trainable: bool) -> Case:
    return Case(
        op="linear_logprobs",
        name=name,
        why=why,
        sizes=sizes,
        make=make(trainable=trainable),
        work=work,
        truth=truth,
        timed=BOTH,
    )


CASES = (
    _case(
        "frozen",
        "the response rows of a pair under a frozen head",
        {
            "cuda": {"rows": 200, "width": 3584, "vocabulary": 152064},
            "cpu": {"rows": 120, "width": 896, "vocabulary": 32064},
            "small": SMALL,
        },
        trainable=False,
    ),
    _case(
        "trainable",
        "4,096 rows under a head that is trained, the size at which others publish",
        {
            "cuda": {"rows": 4096, "width": 4096, "vocabulary": 128256},
            "cpu": {"rows": 120, "width": 896, "vocabulary": 32064},
            "small": SMALL,
        },
        trainable=True,
    ),
)
