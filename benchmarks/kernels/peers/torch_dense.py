"""Plain PyTorch, in the dtype of the inputs: products, masks, softmax, sums over segments."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from benchmarks.kernels.case import CannotServe, Contestant, Named, NotOfThisCase, Run, timed_run
from benchmarks.kernels.ops import attention_mass, linear_logprobs, preference_loss, tree_attention
from benchmarks.kernels.peers.packages import anywhere
from mmdpo_kernels.tree_mask import visible

# More would not fit, and nobody would try.
MOST_SCORES = 2**31


def _tree_attention(problem: tree_attention.Problem) -> Run:
    if problem.rows is not None:  # eager maps are this, with the maps given out
        raise NotOfThisCase
    heads, length = problem.query.shape[1:3]
    if heads * length**2 > MOST_SCORES:
        raise CannotServe(f"{heads} x {length} x {length} scores are not held")
    tree_end = problem.tree_end
    if tree_end is None:
        tree_end = torch.full((1, length), length, device=problem.query.device)
    hidden = ~visible(tree_end)[:, None]
    one_hot = _one_hot(problem.segments, problem.num_segments, problem.query.dtype)

    def forward() -> Named:
        key, value = (tensor.repeat_interleave(problem.kv_groups, dim=1) for tensor in (problem.key, problem.value))
        scores = (problem.query @ key.mT * problem.scale).masked_fill(hidden, float("-inf"))
        probabilities = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        found = {"output": probabilities @ value}
        return found | ({"mass": probabilities @ one_hot} if problem.num_segments else {})

    return timed_run(problem.timed, forward, problem.leaves, {"output": problem.grad_output})


def _attention_mass(problem: attention_mass.Problem) -> Run:
    hidden = torch.arange(problem.key.shape[2], device=problem.key.device) > problem.row_positions[:, :, None]
    one_hot = _one_hot(problem.segments, problem.num_segments, problem.key.dtype)
    groups = problem.query_rows.shape[1] // problem.key.shape[1]

    def forward() -> Named:
        key = problem.key.repeat_interleave(groups, dim=1)
        scores = (problem.query_rows @ key.mT * problem.scale).masked_fill(hidden[:, None], float("-inf")).float()
        probabilities = scores.softmax(-1) if problem.lse is None else torch.exp(scores - problem.lse[..., None])
        if problem.reduce == "tokens":
            return {"mass": probabilities.mean((1, 2))}
        mass = (probabilities.to(one_hot.dtype) @ one_hot).float()
        return {"mass": mass if problem.reduce is None else mass.mean((1, 2))}

    return timed_run(problem.timed, forward, problem.leaves, {"mass": problem.grad_mass})


def _linear_logprobs(problem: linear_logprobs.Problem) -> Run:
    linear_logprobs.require_products(problem)

    def logps(hidden: Tensor) -> Tensor:
        logits = (hidden @ problem.weight.T).float()
        return logits.log_softmax(-1).gather(1, problem.targets[:, None])[:, 0]

    def forward() -> Named:
        found = {"logps": logps(problem.hidden)}
        if problem.reference_hidden is not None:
            with torch.no_grad():
                found["reference_logps"] = logps(problem.reference_hidden)
        return found

    return timed_run(problem.timed, forward, problem.leaves, {"logps": problem.grad_logps})


def _preference_loss(problem: preference_loss.LossProblem | preference_loss.HeadProblem) -> Run:
    if isinstance(problem, preference_loss.LossProblem):
        return _mdpo(problem)

    def logps(hidden: Tensor) -> Tensor:
        rows, targets = problem.responses(hidden), problem.responses(problem.targets)
        return (rows @ problem.weight.T).float().log_softmax(-1).gather(-1, targets[..., None])[..., 0].sum(-1)

    def forward() -> Named:
        with torch.no_grad():
            reference = logps(problem.reference_hidden)
        chosen, rejected = (logps(problem.hidden) - reference).chunk(2)
        return {"loss": -logsigmoid(preference_loss.BETA * (chosen - rejected)).mean()}

    return timed_run(problem.timed, forward, problem.leaves, {"loss": torch.ones((), device=problem.hidden.device)})


def _mdpo(problem: preference_loss.LossProblem) -> Run:
    """Tokens are summed in one go; which response each belongs to is known beforehand."""
    device, owners = problem.policy.device, None
    if problem.lengths is not None:
        counts = problem.lengths.flatten()
        owners, zeros = (
            torch.arange(len(counts), device=device).repeat_interleave(counts),
            torch.zeros(len(counts), device=device),
        )

    def forward() -> Named:
        ratios = problem.policy - problem.reference
        if owners is not None:
            ratios = zeros.index_add(0, owners, ratios).view(-1, 3).T
        chosen, rejected, corrupted = preference_loss.BETA * ratios
        loss = -(logsigmoid(chosen - rejected) + logsigmoid(chosen - corrupted) + logsigmoid(chosen)).mean()
        if owners is None:
            return {"loss": loss}
        with torch.no_grad():
            return {"loss": loss, **preference_loss.metrics(chosen.detach(), rejected.detach(), corrupted.detach())}

    return timed_run(problem.timed, forward, problem.leaves, {"loss": torch.ones((), device=device)})


def _one_hot(segments: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """(B, S) -> (B, 1, S, N)."""
    return (segments[:, None, :, None] == torch.arange(count, device=segments.device)).to(dtype)


PREPARE = {
    "tree_attention": _tree_attention,
    "attention_mass": _attention_mass,
    "linear_logprobs": _linear_logprobs,
    "preference_loss": _preference_loss,
}
CONTESTANTS = {
    op: [Contestant(name="torch, dense", ours=False, prepare=prepare, unavailable_reason=anywhere, package="torch")]
    for op, prepare in PREPARE.items()
}
