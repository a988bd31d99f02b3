"""Cases of `attention_mass`: a response's rows against the keys of a whole prompt, as recording attention ratios asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.kernels.case import BOTH, FORWARD, Case, Named, Run, Work, timed_run, without_products
from benchmarks.kernels.ops.tree_attention import image_of
from mmdpo_kernels import attention_mass
from mmdpo_kernels.backends.calls import AttentionMassCall
from mmdpo_kernels.backends.reference import attention_mass as reference

if TYPE_CHECKING:
    from benchmarks.kernels.choose_backends import Inputs, Setting

Sizes = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Inputs of one case; batch size 1, the rows are the last ones of a causal sequence."""

    query_rows: Tensor  # (1, Hq, R, D)
    key: Tensor  # (1, Hkv, S, D)
    segments: Tensor  # (1, S)
    row_positions: Tensor  # (1, R)
    num_segments: int
    lse: Tensor | None  # (1, Hq, R)
    reduce: str | None
    grad_mass: Tensor
    """The shape of the result."""
    timed: str

    @property
    def leaves(self) -> Named:
        return {"query_rows": self.query_rows, "key": self.key}

    @property
    def scale(self) -> float:
        return self.query_rows.shape[-1] ** -0.5


def make(
    *, timed: str, reduce: str | None = None, with_lse: bool = False
) -> Callable[[Sizes, torch.device, torch.dtype], Problem]:
    """A maker of problems."""

    def make_problem(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
        rows, length, heads, dim, count = (sizes[name] for name in ("rows", "length", "heads", "dim", "pictures"))
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        query_rows, key = random(1, heads, rows, dim), random(1, sizes["kv_heads"], length, dim)
        positions = torch.arange(length - rows, length, device=device)[None]
        shape = {None: (1, heads, rows, count), "mean": (1, count), "tokens": (1, length)}[reduce]
        lse = None
        if with_lse:
            keys = key.double().repeat_interleave(heads // key.shape[1], dim=1)
            scores = query_rows.double() @ keys.mT * dim**-0.5
            unseen = torch.arange(length, device=device) > positions[0, :, None]
            lse = scores.masked_fill(unseen, float("-inf")).logsumexp(-1).float()
        return Problem(
            query_rows=query_rows.requires_grad_(),
            key=key.requires_grad_(),
            segments=torch.tensor([image_of(range(length), length, count)], dtype=torch.int32, device=device),
            row_positions=positions.to(torch.int32),
            num_segments=count,
            lse=lse,
            reduce=reduce,
            grad_mass=random(*shape).float(),
            timed=timed,
        )

    return make_problem


def work(problem: Problem) -> Work:
    """Forward one product of rows and keys; backward two more, on probabilities that were kept."""
    _, heads, rows, dim = problem.query_rows.shape
    length, size = problem.key.shape[2], problem.key.element_size()
    passes = 3 if problem.timed == BOTH else 1
    moved = size * (problem.query_rows.numel() + problem.key.numel()) + 4 * problem.grad_mass.numel()
    # Backward reads the inputs again and writes their gradients.
    return Work(flops=passes * 2 * heads * rows * length * dim, bytes=moved * (3 if problem.timed == BOTH else 1))


def truth(problem: Problem) -> Named:
    """The reference in float64."""
    query, key = (tensor.detach().double() for tensor in (problem.query_rows, problem.key))
    call = AttentionMassCall(
        segments=problem.segments,
        row_positions=problem.row_positions.long(),
        num_segments=problem.num_segments,
        tree_end=None,
        lse=None,
        scale=problem.scale,
        softcap=None,
        window=None,
        reduce=problem.reduce,
    )
    found = {"mass": reference.forward(query, key, call)}
    if problem.timed == BOTH:
        grads = reference.backward(problem.grad_mass.double(), query, key, call)
        found |= dict(zip(("grad_query_rows", "grad_key"), grads, strict=True))
    return found


def prepare(problem: Problem, backend: str) -> Run:
    """One of our backends, or "auto", with the inputs of a case in hand."""

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


def choice_kinds(device: str, *, mass: bool) -> Iterator[dict[str, bool]]:
    """What `choose_backends` tells apart."""
    yield {"gradient": False}


def choice_call(setting: Setting, inputs: Inputs) -> Callable[[str], Any]:
    """The call as a function of the backend's name."""
    query = inputs.heads(setting.heads, setting.response)
    rows = torch.arange(setting.length - setting.response, setting.length, device=query.device)[None]
    options = {"row_positions": rows, "num_segments": inputs.num_segments, "tree_end": inputs.tree_end, "reduce": "mean"}
    return lambda backend: attention_mass(query, inputs.key, inputs.segments, **options, backend=backend)


SIZES = {
    "cuda": {"rows": 100, "length": 3100, "heads": 32, "kv_heads": 8, "dim": 128, "pictures": 5},
    "cpu": {"rows": 60, "length": 3000, "heads": 32, "kv_heads": 8, "dim": 128, "pictures": 5},
    "small": {"rows": 7, "length": 90, "heads": 4, "kv_heads": 2, "dim": 32, "pictures": 3},
}
# On a GPU all cases are in bfloat16.
BFLOAT16 = {"dtype": torch.bfloat16, "unfit": without_products}
ON_CPU = {size: SIZES[size] for size in ("cpu", "small")}


def _case(
    name: str,
    why: str,
    *,
    sizes: Mapping[str, Sizes] = SIZES,
    timed: str = FORWARD,
    reduce: str | None = None,
    with_lse: bool = False,
    **traits: Any,
) -> Case:
    return Case(
        op="attention_mass",
        name=name,
        why=why,
        sizes=sizes,
        make=make(timed=timed, reduce=reduce, with_lse=with_lse),
        work=work,
        truth=truth,
        timed=timed,
        **traits,
    )


CASES = (
    _case("rows", "mass of each response row on each of five pictures"),
    _case("rows_lse", "the same where attention has left its log-sum-exp", with_lse=True),
    _case("rows_bf16", "mass of each response row on each of five pictures", sizes=ON_CPU, **BFLOAT16),
    _case("mean", "one ratio a response: mean over heads and rows", reduce="mean", with_lse=True),
    _case("tokens", "a heat map: each key's share, mean over heads and rows", reduce="tokens"),
    _case("backward", "a loss on where a response looks", timed=BOTH),
)

COMPILED = (("rows", "rows_lse", "mean"), ("tokens", "backward"))
"""Cases that a GPU run compiles ahead of timing, a process for each group."""
