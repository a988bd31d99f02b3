"""Cases of `preference_loss`: the loss alone, from tokens and from sums, and from hidden states to the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from benchmarks.kernels.case import BOTH, Case, Named, Run, Work, timed_run
from benchmarks.kernels.ops.linear_logprobs import peaked
from mmdpo_kernels import SequenceLogps, TokenLogps, linear_logprobs, preference_loss
from mmdpo_kernels.loss_terms import BRANCHES

if TYPE_CHECKING:
    from benchmarks.kernels.choose_backends import Inputs, Setting

Sizes = Mapping[str, int]
BETA = 0.1


@dataclass(frozen=True, kw_only=True)
class LossProblem:
    """mDPO on log-probabilities of B triples, chosen, rejected, corrupted: of their tokens, triple after triple, or (3, B) sums."""

    policy: Tensor  # (R,) or (3, B)
    reference: Tensor  # as policy
    lengths: Tensor | None  # (B, 3) tokens; None: sums
    timed: str = BOTH

    @property
    def leaves(self) -> Named:
        return {"policy": self.policy}


@dataclass(frozen=True, kw_only=True)
class HeadProblem:
    """DPO from the hidden states of B pairs under one frozen head, responses of one length; chosen sequences come first."""

    hidden: Tensor  # (2 B, P + T, H)
    reference_hidden: Tensor  # (2 B, P + T, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (2 B, P + T), -100 in the P rows of the prompt
    prompt: int
    """P. Only rows after these are scored, which is for a contestant to make use of."""
    timed: str = BOTH

    @property
    def leaves(self) -> Named:
        return {"hidden": self.hidden}

    def responses(self, rows: Tensor) -> Tensor:
        """The rows of the responses."""
        return rows[:, self.prompt :]


def make_loss(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> LossProblem:
    """Log-probabilities are float32 whatever the model is."""
    generator = torch.Generator().manual_seed(0)
    mean = sizes["response"]
    lengths = torch.randint(mean // 2, mean + mean // 2 + 1, (sizes["batch"], 3), generator=generator)
    policy, reference = (-3 * torch.rand(int(lengths.sum()), generator=generator) for _ in range(2))
    return LossProblem(policy=policy.to(device).requires_grad_(), reference=reference.to(device), lengths=lengths.to(device))


def make_sums(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> LossProblem:
    """The same of whole responses."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (-60 + 10 * torch.randn(3, sizes["batch"], generator=generator) for _ in range(2))
    return LossProblem(policy=policy.to(device).requires_grad_(), reference=reference.to(device), lengths=None)


def make_head(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> HeadProblem:
    """Policy and reference are near each other, as early in training."""
    on = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    sequences, prompt, width, vocabulary = 2 * sizes["pairs"], sizes["prompt"], sizes["width"], sizes["vocabulary"]
    rows = prompt + sizes["response"]
    weight = (torch.randn(vocabulary, width, **on) * width**-0.5).to(dtype)
    targets = torch.randint(vocabulary, (sequences * rows,), **on)
    hidden = peaked(sequences * rows, weight, targets, on["generator"]).view(sequences, rows, width)
    nearby = hidden + 0.05 * torch.randn(hidden.shape, **on)
    targets = targets.view(sequences, rows)
    targets[:, :prompt] = -100
    return HeadProblem(
        hidden=hidden.to(device, dtype).requires_grad_(),
        reference_hidden=nearby.to(device, dtype),
        weight=weight.to(device),
        targets=targets.to(device),
        prompt=prompt,
    )


def loss_work(problem: LossProblem) -> Work:
    """Both inputs read, one gradient written; a few operations an element."""
    return Work(flops=30.0 * problem.policy.numel(), bytes=3 * 4 * problem.policy.numel())


def head_work(problem: HeadProblem) -> Work:
    """A product of the responses' rows and the head for the policy, one for the reference, one for the gradient."""
    rows, width = problem.responses(problem.targets).numel(), problem.hidden.shape[2]
    moved = problem.hidden.element_size() * (3 * rows * width + 2 * problem.weight.numel())
    return Work(flops=3 * 2 * rows * width * problem.weight.shape[0], bytes=moved)


def loss_truth(problem: LossProblem) -> Named:
    """mDPO written out in float64: DPO, CoPO, and the anchor on the chosen reward."""
    policy = problem.policy.detach().double().requires_grad_()
    ratios = policy - problem.reference.double()
    if problem.lengths is not None:
        ratios = torch.stack([piece.sum() for piece in ratios.split(problem.lengths.flatten().tolist())]).view(-1, 3).T
    chosen, rejected, corrupted = BETA * ratios
    loss = -(logsigmoid(chosen - rejected) + logsigmoid(chosen - corrupted) + logsigmoid(chosen)).mean()
    truth = {"loss": loss, "grad_policy": torch.autograd.grad(loss, policy, retain_graph=True)[0]}
    if problem.lengths is not None:
        truth |= metrics(chosen, rejected, corrupted)
    return {name: value.detach() for name, value in truth.items()}


def metrics(chosen: Tensor, rejected: Tensor, corrupted: Tensor) -> Named:
    """What a trainer logs, from the rewards."""
    return {
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "reward_corrupted": corrupted,
        "accuracies": (chosen > rejected).to(chosen.dtype),
        "margins": chosen - rejected,
    }


def head_truth(problem: HeadProblem) -> Named:
    """Log-softmax of all logits and DPO, in float64."""
    hidden = problem.hidden.detach().double().requires_grad_()
    policy, reference = (_response_logps(problem, rows) for rows in (hidden, problem.reference_hidden.double()))
    chosen, rejected = (BETA * (policy - reference)).chunk(2)
    loss = -logsigmoid(chosen - rejected).mean()
    return {"loss": loss.detach(), "grad_hidden": torch.autograd.grad(loss, hidden)[0]}


def _response_logps(problem: HeadProblem, rows: Tensor) -> Tensor:
    logps = (problem.responses(rows) @ problem.weight.double().T).log_softmax(-1)
    return logps.gather(-1, problem.responses(problem.targets)[..., None])[..., 0].sum(-1)


def prepare(problem: LossProblem | HeadProblem, backend: str) -> Run:
    """One of our backends, or "auto", with the inputs of a case in hand."""
    forward = partial(_loss if isinstance(problem, LossProblem) else _head_and_loss, problem, backend)
    return timed_run(problem.timed, forward, problem.leaves, {"loss": torch.ones((), device=problem.leaves.popitem()[1].device)})


def _loss(problem: LossProblem, backend: str) -> Named:
    options: dict[str, Any] = {"loss_type": ("sigmoid", "copo", "ancpo"), "beta": BETA, "backend": backend}
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


def _head_and_loss(problem: HeadProblem, backend: str) -> Named:
    rows, reference, targets = map(problem.responses, (problem.hidden, problem.reference_hidden, problem.targets))
    found = linear_logprobs(rows.flatten(0, 1), problem.weight, targets.flatten(), reference_hidden=reference.flatten(0, 1))
    pairs = [
        SequenceLogps(chosen=chosen, rejected=rejected)
        for logps in (found.logps, found.reference_logps)
        if logps is not None
        for chosen, rejected in [logps.view(targets.shape).sum(-1).chunk(2)]
    ]
    return {"loss": preference_loss(*pairs, beta=BETA, backend=backend).loss}


def choice_kinds(device: str, *, mass: bool) -> Iterator[dict[str, bool]]:
    """What `choose_backends` tells apart; nothing on a GPU."""
    if device == "cpu":
        yield {"tree": False}


def choice_call(setting: Setting, inputs: Inputs) -> Callable[[str], Any]:
    """The call as a function of the backend's name: mDPO of a triple for every 16 tokens of the length, from the responses' tokens."""
    lengths = torch.full((max(1, setting.length // 16), 3), setting.response)
    policy, reference = (-3 * torch.rand(int(lengths.sum())).to(setting.dtype) for _ in range(2))
    problem = LossProblem(policy=policy.requires_grad_(), reference=reference, lengths=lengths)
    return lambda backend: prepare(problem, backend).call()


CASES = (
    Case(
        op="preference_loss",
        name="mdpo",
        why="mDPO from the log-probabilities of a batch's tokens, with rewards, accuracies and margins: launches only",
        sizes={
            "cuda": {"batch": 64, "response": 40},
            "cpu": {"batch": 64, "response": 40},
            "small": {"batch": 3, "response": 4},
        },
        make=make_loss,
        work=loss_work,
        truth=loss_truth,
        timed=BOTH,
    ),
    Case(
        op="preference_loss",
        name="mdpo_sums",
        why="mDPO from log-probabilities of whole responses, the loss alone: launches only",
        sizes={"cuda": {"batch": 64}, "cpu": {"batch": 64}, "small": {"batch": 3}},
        make=make_sums,
        work=loss_work,
        truth=loss_truth,
        timed=BOTH,
    ),
    Case(
        op="preference_loss",
        name="from_hidden",
        why="DPO from hidden states of response rows, policy and reference, frozen heads",
        sizes={
            "cuda": {"pairs": 4, "prompt": 0, "response": 100, "width": 3584, "vocabulary": 152064},
            "cpu": {"pairs": 2, "prompt": 0, "response": 60, "width": 1024, "vocabulary": 32064},
            "small": {"pairs": 2, "prompt": 0, "response": 5, "width": 32, "vocabulary": 120},
        },
        make=make_head,
        work=head_work,
        truth=head_truth,
        timed=BOTH,
    ),
    Case(
        op="preference_loss",
        name="from_model",
        why="the same of one pair as the model leaves it, with the rows of a prompt with five pictures",
        sizes={
            "cuda": {"pairs": 1, "prompt": 3000, "response": 100, "width": 3584, "vocabulary": 152064},
            "cpu": {"pairs": 1, "prompt": 1024, "response": 40, "width": 1024, "vocabulary": 32064},
            "small": {"pairs": 2, "prompt": 9, "response": 5, "width": 32, "vocabulary": 120},
        },
        make=make_head,
        work=head_work,
        truth=head_truth,
        timed=BOTH,
    ),
)

COMPILED = (("mdpo", "mdpo_sums", "from_hidden"),)
"""Cases that a GPU run compiles ahead of timing, a process for each group."""
