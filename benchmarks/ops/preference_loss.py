"""Cases of `preference_loss`: the loss alone, and from hidden states to the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from benchmarks.case import BOTH, Case, Named, Work
from benchmarks.ops.linear_logprobs import peaked

Sizes = Mapping[str, int]
BETA = 0.1


@dataclass(frozen=True, kw_only=True)
class LossProblem:
    """mDPO on log-probabilities of B triples."""

    policy: Tensor  # (3, B): chosen, rejected, corrupted
    reference: Tensor  # (3, B)
    timed: str = BOTH

    @property
    def leaves(self) -> Named:
        return {"policy": self.policy}


@dataclass(frozen=True, kw_only=True)
class HeadProblem:
    """DPO from the hidden states of B pairs, frozen heads, responses of one length; chosen rows come first."""

    hidden: Tensor  # (2 B, T, H)
    reference_hidden: Tensor  # (2 B, T, H)
    weight: Tensor  # (V, H)
    reference_weight: Tensor  # (V, H)
    targets: Tensor  # (2 B, T)
    timed: str = BOTH

    @property
    def leaves(self) -> Named:
        return {"hidden": self.hidden}


def make_loss(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> LossProblem:
    """Log-probabilities are float32 whatever the model is."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-60 + 10 * torch.randn(3, sizes["batch"], generator=generator) for _ in range(2))
    return LossProblem(policy=policy.to(device).requires_grad_(), reference=reference.to(device))


def make_head(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> HeadProblem:
    """Policy and reference are near each other, as early in training."""
    generator = torch.Generator().manual_seed(0)
    sequences, rows, width, vocabulary = 2 * sizes["pairs"], sizes["response"], sizes["width"], sizes["vocabulary"]
    weight = (torch.randn(vocabulary, width, generator=generator) * width**-0.5).to(dtype)
    targets = torch.randint(vocabulary, (sequences * rows,), generator=generator)
    hidden = peaked(sequences * rows, weight, targets, generator).view(sequences, rows, width)
    nearby = hidden + 0.05 * torch.randn(hidden.shape, generator=generator)
    return HeadProblem(
        hidden=hidden.to(device, dtype).requires_grad_(),
        reference_hidden=nearby.to(device, dtype),
        weight=weight.to(device),
        reference_weight=weight.to(device).clone(),
        targets=targets.view(sequences, rows).to(device),
    )


def loss_work(problem: LossProblem) -> Work:
    """Both inputs read, one gradient written; a few operations an element."""
    return Work(flops=30.0 * problem.policy.numel(), bytes=3 * 4 * problem.policy.numel())


def head_work(problem: HeadProblem) -> Work:
    """A product of rows and head for the policy, one for the reference, one for the gradient."""
    rows, width = problem.targets.numel(), problem.hidden.shape[2]
    moved = problem.hidden.element_size() * (3 * problem.hidden.numel() + 2 * problem.weight.numel())
    return Work(flops=3 * 2 * rows * width * problem.weight.shape[0], bytes=moved)


def loss_truth(problem: LossProblem) -> Named:
    """mDPO written out in float64: DPO, CoPO, and the anchor on the chosen reward."""
    policy = problem.policy.detach().double().requires_grad_()
    chosen, rejected, corrupted = BETA * (policy - problem.reference.double())
    loss = -(logsigmoid(chosen - rejected) + logsigmoid(chosen - corrupted) + logsigmoid(chosen)).mean()
    return {"loss": loss.detach(), "grad_policy": torch.autograd.grad(loss, policy)[0]}


def head_truth(problem: HeadProblem) -> Named:
    """Log-softmax of all logits and DPO, in float64."""
    hidden = problem.hidden.detach().double().requires_grad_()
    policy = _response_logps(hidden, problem.weight, problem.targets)
    reference = _response_logps(problem.reference_hidden.double(), problem.reference_weight, problem.targets)
    chosen, rejected = (BETA * (policy - reference)).chunk(2)
    loss = -logsigmoid(chosen - rejected).mean()
    return {"loss": loss.detach(), "grad_hidden": torch.autograd.grad(loss, hidden)[0]}


def _response_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logps = (hidden @ weight.double().T).log_softmax(-1)
    return logps.gather(-1, targets[..., None])[..., 0].sum(-1)


CASES = (
    Case(
        op="preference_loss",
        name="mdpo",
        why="mDPO on log-probabilities of a batch: launches only",
        sizes={"cuda": {"batch": 64}, "cpu": {"batch": 64}, "small": {"batch": 3}},
        make=make_loss,
        work=loss_work,
        truth=loss_truth,
        timed=BOTH,
    ),
    Case(
        op="preference_loss",
        name="from_hidden",
        why="DPO from hidden states of response rows, policy and reference, frozen heads",
        sizes={
            "cuda": {"pairs": 4, "response": 100, "width": 3584, "vocabulary": 152064},
            "cpu": {"pairs": 2, "response": 60, "width": 896, "vocabulary": 32064},
            "small": {"pairs": 2, "response": 5, "width": 32, "vocabulary": 120},
        },
        make=make_head,
        work=head_work,
        truth=head_truth,
        timed=BOTH,
    ),
)
