"""cuDNN's front end (`nvidia-cudnn-frontend`): attention over intervals of keys, and attention scores summed over heads.

`cudnn.flex_attention` takes for each query the intervals of keys that it sees, which a tree is: its path from the root, cut where other
branches lie between. `cudnn.deepseek_sparse_attention`'s `DenseAttnScoreRecompute` makes probabilities from a log-sum-exp, one matrix of rows
by keys for all heads together, from which masses per picture are summed here. Written against version 1.32; neither has been run here.
"""

from __future__ import annotations

import functools
import importlib
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from benchmarks.kernels.case import BOTH, FORWARD, CannotServe, Contestant, Named, NotOfThisCase, Run, timed_run
from benchmarks.kernels.ops import attention_mass, tree_attention
from mmdpo_kernels.tree_mask import visible

PACKAGE = "nvidia-cudnn-frontend"
ATTENTION, SCORES = "cudnn.flex_attention", "cudnn.deepseek_sparse_attention"
ARCHITECTURES = {ATTENTION: ((9, 0), (10, 0), (10, 3)), SCORES: ((9, 0), (10, 0), (10, 3))}
"""Compute capabilities that each has kernels for."""


def intervals(tree_end: Tensor) -> Tensor:
    """The keys that each query sees, as `create_mask_plan` takes them.

    Args:
        tree_end: (B, S) int.

    Returns:
        (1, F, B S) int32, F odd: query i sees keys [0, F0), [F1, F2), …; ends in order, intervals that are not needed empty.
    """
    batch, length = tree_end.shape
    seen = visible(tree_end)
    edge = seen.new_zeros(batch, length, 1)
    # One where what is seen begins or ends, in front of a key or behind the last.
    turns = torch.cat([edge, seen], -1) != torch.cat([seen, edge], -1)
    # The first interval begins at 0 whatever is seen there; who does not see key 0 has an empty one.
    turns[..., 0] ^= True
    number = turns.cumsum(-1)
    ends = torch.zeros(batch, length, int(number.max()), dtype=torch.int32, device=seen.device)
    rows, queries, keys = turns.nonzero(as_tuple=True)
    ends[rows, queries, number[turns] - 1] = keys.int()
    # An interval that is not needed is empty where the last one ends.
    return ends.cummax(-1).values.flatten(0, 1).T.contiguous()[None]


def _tree_attention(problem: tree_attention.Problem) -> Run:
    module = importlib.import_module(ATTENTION)
    leaves = {name: _heads_last(tensor.detach()).requires_grad_() for name, tensor in problem.leaves.items()}
    length, device = problem.query.shape[2], problem.query.device
    tree_end = problem.tree_end
    if tree_end is None:
        tree_end = torch.full((1, length), length, dtype=torch.int32, device=device)
    try:
        # A model makes the plan once for all layers.
        plan = module.create_mask_plan(intervals(tree_end), *leaves.values(), build_backward=problem.timed != FORWARD)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise CannotServe(" ".join(str(error).split())) from error

    def forward() -> Named:
        for _ in range(problem.layers):
            output = module.flex_attn_func(*leaves.values(), mask_plan=plan, softmax_scale=problem.scale)
        return {"output": output}

    def results(found: Named) -> Named:
        return {name: tensor.transpose(1, 2) for name, tensor in found.items()}

    return timed_run(problem.timed, forward, leaves, {"output": _heads_last(problem.grad_output)}, results)


def _attention_mass(problem: attention_mass.Problem) -> Run:
    if problem.reduce is None or problem.timed == BOTH:
        raise NotOfThisCase  # sums over heads, without a backward
    if problem.lse is None:
        raise CannotServe("it makes probabilities from a log-sum-exp, which this case has none of")
    score = importlib.import_module(SCORES).dense_attn_score_recompute_wrapper
    groups = problem.query_rows.shape[1] // problem.key.shape[1]
    if groups == 1:
        raise CannotServe("its kernels are for several query heads a key head")
    # They are for one key head, too: a call for each.
    parts = list(
        zip(
            _heads_last(problem.query_rows.detach()).split(groups, dim=2),
            _heads_last(problem.key.detach()).split(1, dim=2),
            _heads_last(problem.lse).split(groups, dim=2),
            strict=True,
        )
    )
    answers = problem.query_rows.shape[1] * problem.query_rows.shape[2]
    pictures = torch.arange(problem.num_segments, device=problem.key.device)
    one_hot = (problem.segments[..., None] == pictures).float()
    offsets = problem.row_positions[:, 0].int().contiguous()

    def forward() -> Named:
        total: Tensor | int = 0
        for query, key, lse in parts:
            found = score(query, key, lse, problem.scale, qhead_per_kv_head=groups, q_causal_offsets=offsets)
            # Keys that a row does not see may be -inf in it; all others are above zero.
            total = total + found["out"].clamp_min(0).sum(1)
        return {"mass": (total[:, None] @ one_hot)[:, 0] / answers}

    return timed_run(problem.timed, forward, problem.leaves, {"mass": problem.grad_mass})


def _heads_last(tensor: Tensor) -> Tensor:
    """(B, H, S, …) -> (B, S, H, …), contiguous."""
    return tensor.transpose(1, 2).contiguous()


def _unavailable_reason(module: str, device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cuda":
        return "it runs on cuda only"
    # The scores are for bfloat16 alone.
    kinds = (torch.bfloat16,) if module == SCORES else (torch.float16, torch.bfloat16)
    if dtype not in kinds:
        return f"it takes {' and '.join(str(kind).removeprefix('torch.') for kind in kinds)}, not {dtype}"
    try:
        installed = version(PACKAGE)
    except PackageNotFoundError:
        return f"{PACKAGE} is not installed"
    capability = torch.cuda.get_device_capability()
    if capability not in ARCHITECTURES[module]:
        known = ", ".join(f"{major}.{minor}" for major, minor in ARCHITECTURES[module])
        return f"it has kernels for compute capability {known}, this GPU has {capability[0]}.{capability[1]}"
    try:
        found = importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # without CUTLASS's Python, or cuDNN itself
        return f"{module} of {PACKAGE} {installed} cannot be imported: {error}"
    names = {ATTENTION: ("create_mask_plan", "flex_attn_func"), SCORES: ("dense_attn_score_recompute_wrapper",)}[module]
    lacking = [name for name in names if not hasattr(found, name)]
    return f"{PACKAGE} {installed} has no {', '.join(lacking)}; take 1.32 or newer" if lacking else None


CONTESTANTS = {
    "tree_attention": [
        Contestant(
            name="cuDNN, intervals",
            ours=False,
            prepare=_tree_attention,
            unavailable_reason=functools.partial(_unavailable_reason, ATTENTION),
            package=PACKAGE,
        )
    ],
    "attention_mass": [
        Contestant(
            name="cuDNN, scores of all heads",
            ours=False,
            prepare=_attention_mass,
            unavailable_reason=functools.partial(_unavailable_reason, SCORES),
            package=PACKAGE,
        )
    ],
}
