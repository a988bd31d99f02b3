"""The cases of `linear_logprobs` for `accuracy.py`: vocabularies of 32k to 152k tokens, one to 4,096 rows, frozen and trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdpo_kernels import linear_logprobs

Named = dict[str, Tensor]
OP = "linear_logprobs"
STATS = ("entropy", "max_logp", "mean_logit")
SIZE = "mean of absolute logits"
# Rows of plain PyTorch at a time, whose logits are held several times over.
PLAIN_ROWS = 512
SMALL_ROWS = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One head. For kernels that an interpreter runs there are a few rows of it."""

    name: str
    rows: int
    vocabulary: int
    calls: int = 1
    """Of `rows` rows each: of a single one plain PyTorch may hit all that there is by luck."""
    trained: bool = False
    width: int = 32
    softcap: float | None = None
    op: str = OP


CASES = tuple(
    Case(name=f"{name}, {vocabulary:,} tokens{', trained' if trained else ''}", rows=rows, vocabulary=vocabulary, calls=calls, trained=trained)
    for vocabulary in (32064, 151936)
    for name, rows, calls, trained in (
        ("1 row at a time", 1, 64, False), ("200 rows", 200, 1, False), ("4,096 rows", 4096, 1, False),
        ("1 row at a time", 1, 64, True), ("200 rows", 200, 1, True),
    )
) + (
    Case(name="4,096 rows, 32,064 tokens, trained", rows=4096, vocabulary=32064, trained=True),
    Case(name="softcap", rows=64, vocabulary=50257, softcap=5.0),
)  # fmt: skip


SMALL_CASES = (
    Case(name="frozen", rows=40, vocabulary=301, softcap=5.0),
    Case(name="trained", rows=1, calls=40, vocabulary=301, trained=True),
)
"""To see that everything runs."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The inputs of a case in one dtype."""

    case: Case
    leaves: Named
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (T,)
    grad_logps: Tensor  # (T,)


def problem(case: Case, *, small: bool, dtype: torch.dtype, device: str) -> Problem:
    """The same numbers every time; targets are likely in two rows of three and ignored in a few."""
    generator = torch.Generator().manual_seed(0)
    rows = min(case.rows * case.calls, SMALL_ROWS) if small else case.rows * case.calls
    weight = torch.randn(case.vocabulary, case.width, generator=generator) * case.width**-0.5
    targets = torch.randint(case.vocabulary, (rows,), generator=generator)
    hidden = torch.randn(rows, case.width, generator=generator)
    hidden[1::3] += 8 * weight[targets[1::3]]
    hidden[2::3] += 24 * weight[targets[2::3]]
    targets[7::8] = -100
    weight, hidden = (tensor.to(device, dtype) for tensor in (weight, hidden))
    bias = (torch.randn(case.vocabulary, generator=generator) * 0.1).to(device, dtype) if case.trained else None
    leaves = {"hidden": hidden} | ({"weight": weight, "bias": bias} if bias is not None else {})
    up = torch.randn(rows, generator=generator).to(device)
    return Problem(case=case, leaves=leaves, weight=weight, bias=bias, targets=targets.to(device), grad_logps=up)


def ours(given: Problem, backend: str) -> Named:
    """Outputs and gradients of a backend."""
    return _joined([_our_rows(given, rows, backend) for rows in _calls(given)])


def plain(given: Problem, dtype: torch.dtype) -> Named:
    """The same by log-softmax of all logits and PyTorch's autograd; rows at a time where only they have gradients."""
    return _joined([_plain_rows(given, rows, dtype) for rows in _row_groups(given)])


def _calls(given: Problem) -> Iterator[slice]:
    count = given.targets.shape[0]
    step = count if given.case.calls == 1 else given.case.rows
    return (slice(start, start + step) for start in range(0, count, step))


def _row_groups(given: Problem) -> Iterator[slice]:
    if given.case.trained or given.case.calls > 1:
        return _calls(given)
    return (slice(start, start + PLAIN_ROWS) for start in range(0, given.targets.shape[0], PLAIN_ROWS))


def _joined(pieces: list[Named]) -> Named:
    """Of all calls: rows one after the other, gradients of the head added up."""
    of_head = ("gradient of weight", "gradient of bias")
    found = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0] if name not in of_head}
    sums = {
        name: sum(piece[name].double() for piece in pieces).to(pieces[0][name].dtype) for name in of_head if name in pieces[0]
    }
    return found | sums


def _our_rows(given: Problem, rows: slice, backend: str) -> Named:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in given.leaves.items()}
    leaves["hidden"] = given.leaves["hidden"].detach()[rows].requires_grad_()
    inputs = {"weight": given.weight, "bias": given.bias, **leaves}
    found = linear_logprobs(**inputs, targets=given.targets[rows], softcap=given.case.softcap, stats=STATS, backend=backend)
    grads = torch.autograd.grad(found.logps, list(leaves.values()), given.grad_logps[rows])
    outputs = {name: getattr(found, name) for name in ("logps", *STATS)}
    return {**outputs, **{f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def _plain_rows(given: Problem, rows: slice, dtype: torch.dtype) -> Named:
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in given.leaves.items()}
    leaves["hidden"] = given.leaves["hidden"].detach()[rows].to(dtype).requires_grad_()
    weight, bias = leaves.get("weight", given.weight.to(dtype)), leaves.get("bias")
    logits = torch.nn.functional.linear(leaves["hidden"], weight, bias)
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    if given.case.softcap is not None:
        logits = given.case.softcap * torch.tanh(logits / given.case.softcap)
    used = given.targets[rows] != -100
    every = logits.log_softmax(-1)
    logps = every.gather(1, given.targets[rows].clamp(min=0)[:, None])[:, 0].where(used, 0.0)
    grads = torch.autograd.grad(logps, list(leaves.values()), given.grad_logps[rows].to(logps.dtype))
    stats = {
        "entropy": -(every.exp() * every).sum(-1),
        "max_logp": every.amax(-1),
        "mean_logit": logits.mean(-1),
        SIZE: logits.abs().mean(-1),
    }
    outputs = {"logps": logps.detach(), **{name: value.detach().where(used, 0.0) for name, value in stats.items()}}
    return {**outputs, **{f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def compare(
    case: Case, backend: str, dtype: torch.dtype, device: str, *, small: bool
) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
    """Tensor by tensor: name, the backend's, plain PyTorch's in the same dtype, the truth, and the size that a rounding step is of.

    That is the largest entry, but for the mean logit, in which a vocabulary of logits of both signs cancels: theirs.
    """
    given = problem(case, small=small, dtype=dtype, device=device)
    mine, usual, truth = ours(given, backend), plain(given, dtype), plain(given, torch.float64)
    for name, tensor in mine.items():
        yield name, tensor, usual[name], truth[name], truth[SIZE if name == "mean_logit" else name].abs().max()
