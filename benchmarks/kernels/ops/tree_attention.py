"""Cases of `tree_attention`: a long causal sequence, the trees of preference training, attention with ratios recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.kernels.case import (
    BACKWARD,
    BOTH,
    FORWARD,
    WITHOUT_MASS,
    Case,
    Named,
    NotOfThisCase,
    Run,
    Work,
    timed_run,
    without_products,
)
from mmdpo_kernels import attention_mass, tree_attention
from mmdpo_kernels.backends.calls import AttentionMassCall, TreeAttentionCall
from mmdpo_kernels.backends.reference import attention_mass as reference_mass
from mmdpo_kernels.backends.reference import tree_attention as reference

if TYPE_CHECKING:
    from benchmarks.kernels.choose_backends import Inputs, Setting

Sizes = Mapping[str, int]
# A node of a tree: its tokens, and its children.
Node = tuple[int, Sequence["Node"]]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Inputs of one case; batch size 1."""

    query: Tensor  # (1, Hq, S, D)
    key: Tensor  # (1, Hkv, S, D)
    value: Tensor  # (1, Hkv, S, D)
    tree_end: Tensor | None  # (1, S)
    segments: Tensor  # (1, S)
    num_segments: int
    """0: no mass is asked for."""
    paths: Tensor
    """(N, L): packed indices of the N whole sequences, which is what everybody else is given."""
    grad_output: Tensor  # (1, Hq, S, D)
    timed: str
    layers: int = 1
    """Calls in a row."""
    rows: Tensor | None = None
    """(R,): rows whose attention per segment is wanted at one of the layers, mean over heads and rows."""
    compiled: bool = False
    """FlexAttention takes part; half a minute of compilation a shape is too much for every case."""

    @property
    def leaves(self) -> Named:
        return {"query": self.query, "key": self.key, "value": self.value}

    @property
    def scale(self) -> float:
        return self.query.shape[-1] ** -0.5

    @property
    def kv_groups(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    def sequences(self) -> tuple[Named, Tensor]:
        """query, key and value of the whole sequences (N, H, L, D), shared tokens repeated, and the gradient of their output.

        Of a token's copies one has the gradient, so that gradients of the copies add up to those of the tree.
        """
        unshared = {name: self._unshare(leaf).requires_grad_() for name, leaf in self.leaves.items()}
        return unshared, self._unshare(self.grad_output) * self._first_copies()[:, None, :, None]

    def packed(self, found: Named) -> Named:
        """Results of whole sequences (N, H, L, D) as those of the tree: outputs of one copy, gradients of all summed."""
        first = self._first_copies()[:, None, :, None]
        return {name: self._pack(tensor if name.startswith("grad_") else tensor * first) for name, tensor in found.items()}

    def _unshare(self, packed: Tensor) -> Tensor:
        return packed.detach()[0][:, self.paths].transpose(0, 1).contiguous()

    def _pack(self, tensor: Tensor) -> Tensor:
        heads, length, dim = tensor.shape[1], self.query.shape[2], tensor.shape[3]
        total = torch.zeros(heads, length, dim, dtype=torch.float64, device=tensor.device)
        return total.index_add_(1, self.paths.flatten(), tensor.transpose(0, 1).flatten(1, 2).double())[None]

    def _first_copies(self) -> Tensor:
        """(N, L) of zeros and ones: one copy of each token has a one."""
        flat = self.paths.flatten().tolist()
        seen: set[int] = set()
        ones = [0.0 if token in seen or seen.add(token) else 1.0 for token in flat]
        return torch.tensor(ones, dtype=self.query.dtype, device=self.paths.device).view(self.paths.shape)


def make(
    forest: Callable[[Sizes], Sequence[Node]], *, timed: str, mass: bool = False, recorded: bool = False, compiled: bool = False
) -> Callable[[Sizes, torch.device, torch.dtype], Problem]:
    """A maker of problems over a forest of nodes.

    Args:
        mass: of every row, on `pictures` segments.
        recorded: `layers` calls in a row, and at one of them the mass of the last `response` rows.
        compiled: see `Problem`.
    """

    def make_problem(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Problem:
        tree_end, depths, paths = lay(forest(sizes))
        length = len(tree_end)
        generator = torch.Generator().manual_seed(0)

        def random(heads: int) -> Tensor:
            return torch.randn(1, heads, length, sizes["dim"], generator=generator).to(device, dtype)

        heads, kv_heads = sizes["heads"], sizes["kv_heads"]
        leaves = {
            name: random(count).requires_grad_() for name, count in (("query", heads), ("key", kv_heads), ("value", kv_heads))
        }
        rows = torch.arange(length - sizes["response"], length, device=device) if recorded else None
        return Problem(
            **leaves,
            tree_end=torch.tensor([tree_end], dtype=torch.int32, device=device) if len(set(tree_end)) > 1 else None,
            segments=torch.tensor([image_of(depths, length, sizes["pictures"])], dtype=torch.int32, device=device),
            num_segments=sizes["pictures"] if mass or recorded else 0,
            paths=torch.tensor(paths, device=device),
            grad_output=random(heads),
            timed=timed,
            layers=sizes["layers"] if recorded else 1,
            rows=rows,
            compiled=compiled,
        )

    return make_problem


def lay(forest: Sequence[Node]) -> tuple[list[int], list[int], list[list[int]]]:
    """tree_end and depth of each packed token, and the packed indices of each path from a root to a leaf."""
    tree_end: list[int] = []
    depths: list[int] = []
    paths: list[list[int]] = []

    def visit(node: Node, before: list[int]) -> None:
        length, children = node
        start = len(tree_end)
        path = [*before, *range(start, start + length)]
        tree_end.extend([0] * length)
        depths.extend(range(len(before), len(path)))
        for child in children:
            visit(child, path)
        tree_end[start : start + length] = [len(tree_end)] * length
        if not children:
            paths.append(path)

    for root in forest:
        visit(root, [])
    return tree_end, depths, paths


def image_of(depths: Sequence[int], length: int, pictures: int) -> list[int]:
    """The segment of tokens at these depths: `pictures` runs of equal length over the first four fifths, -1 after them."""
    run = max(1, length * 4 // 5 // pictures)
    return [depth // run if depth < run * pictures else -1 for depth in depths]


def work(problem: Problem) -> Work:
    """Forward 4 D a visible pair and head (two products), backward 10 D (five)."""
    length, dim = problem.query.shape[2:]
    ends = length if problem.tree_end is None else problem.tree_end[0].double()
    pairs = float((ends - torch.arange(length, device=problem.query.device, dtype=torch.float64)).sum())
    products = {FORWARD: 2, BACKWARD: 5, BOTH: 7}[problem.timed]
    row = dim * problem.query.element_size() * length
    # query, output, key, value; backward reads them and the output's gradient, and writes three gradients.
    forward = row * (2 * problem.query.shape[1] + 2 * problem.key.shape[1])
    backward = row * (4 * problem.query.shape[1] + 4 * problem.key.shape[1])
    moved = {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[problem.timed]
    if problem.num_segments and problem.rows is None:
        moved += 4 * length * problem.query.shape[1] * problem.num_segments
    return Work(flops=problem.layers * products * 2 * dim * pairs * problem.query.shape[1], bytes=problem.layers * moved)


def truth(problem: Problem) -> Named:
    """The reference in float64, one key head after another: nothing of all heads times S x S exists."""
    parts: list[Named] = []
    for head in range(problem.key.shape[1]):
        group = slice(head * problem.kv_groups, (head + 1) * problem.kv_groups)
        query, grad = (tensor.detach()[:, group].double() for tensor in (problem.query, problem.grad_output))
        key, value = (tensor.detach()[:, head : head + 1].double() for tensor in (problem.key, problem.value))
        count = problem.num_segments if problem.rows is None else 0
        call = TreeAttentionCall(problem.tree_end, problem.segments, count, problem.scale, softcap=None, window=None)
        output, lse, mass = reference.forward(query, key, value, call)
        found = {"output": output, "lse": lse, "mass": mass}
        if problem.timed != FORWARD:
            grads = reference.backward(grad, None, None, query, key, value, output, lse, call)
            found |= dict(zip(("grad_query", "grad_key", "grad_value"), grads, strict=True))
        parts.append(found)
    found = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    if problem.rows is not None:
        found["mass"] = reference_mass.forward(
            problem.query.detach()[:, :, problem.rows].double(),
            problem.key.detach().double(),
            AttentionMassCall(
                segments=problem.segments,
                row_positions=problem.rows[None],
                num_segments=problem.num_segments,
                tree_end=problem.tree_end,
                lse=None,
                scale=problem.scale,
                softcap=None,
                window=None,
                reduce="mean",
            ),
        )
    return {name: tensor for name, tensor in found.items() if tensor.numel()}


def prepare(problem: Problem, backend: str, with_mass: bool = True) -> Run:
    """One of our backends, or "auto", with the inputs of a case in hand."""
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


def choice_kinds(device: str, *, mass: bool) -> Iterator[dict[str, bool]]:
    """What `choose_backends` tells apart; with mass of every row where that is affordable."""
    for tree in (False, True):
        for gradient in (False, True):
            yield {"tree": tree, "gradient": gradient}
    if mass:
        yield {"mass": True}


def choice_call(setting: Setting, inputs: Inputs) -> Callable[[str], Any]:
    """The call as a function of the backend's name."""
    query = inputs.heads(setting.heads, setting.length)
    upstream = torch.randn_like(query)
    mass = {"segments": inputs.segments, "num_segments": inputs.num_segments} if setting.mass else {}

    def run(backend: str) -> Any:
        found = tree_attention(query, inputs.key, inputs.value, inputs.tree_end, **mass, backend=backend)
        results = [found.output, found.mass] if setting.mass else [found.output]
        if not setting.gradient:
            return results
        leaves = (query, inputs.key, inputs.value)
        return torch.autograd.grad(results, leaves, [upstream, *(torch.ones_like(r) for r in results[1:])])

    return run


def _causal(sizes: Sizes) -> list[Node]:
    return [(sizes["length"], [])]


def _pair(sizes: Sizes) -> list[Node]:
    return [(sizes["prompt"], [(sizes["response"], [])] * 2)]


def _triple(sizes: Sizes) -> list[Node]:
    return [*_pair(sizes), (sizes["prompt"], [(sizes["response"], [])])]


def _questions(sizes: Sizes) -> list[Node]:
    question = (sizes["question"], [(sizes["response"], [])] * 2)
    return [(sizes["prompt"] - sizes["question"], [question] * sizes["questions"])]


LLM = {"heads": 32, "kv_heads": 8, "dim": 128, "pictures": 5}
TINY = {"heads": 4, "kv_heads": 2, "dim": 32, "pictures": 5}
LONG = {"cuda": {**LLM, "length": 8192}, "small": {**TINY, "length": 96}}
SMALL_PAIR = {**TINY, "prompt": 80, "response": 12}
PAIR = {
    "cuda": {**LLM, "prompt": 3000, "response": 100},
    "cpu": {**LLM, "prompt": 1500, "response": 60},
    "small": SMALL_PAIR,
}


def _case(
    name: str,
    why: str,
    forest: Callable[[Sizes], Sequence[Node]],
    sizes: Mapping[str, Sizes],
    timed: str,
    dtype: torch.dtype | None = None,
    **traits: bool,
) -> Case:
    return Case(
        op="tree_attention",
        name=name,
        why=why,
        sizes=sizes,
        make=make(forest, timed=timed, **traits),
        work=work,
        truth=truth,
        timed=timed,
        dtype=dtype,
        **({} if dtype is None else {"unfit": without_products}),
    )


CASES = (
    _case(
        "pair",
        "a preference pair: one prompt of pictures and text, chosen and rejected response",
        _pair,
        PAIR,
        BOTH,
        compiled=True,
    ),
    _case(
        "pair_bf16",
        "the same pair in bfloat16",
        _pair,
        # On a GPU all cases are in bfloat16.
        {size: PAIR[size] for size in ("cpu", "small")},
        BOTH,
        dtype=torch.bfloat16,
    ),
    _case(
        "recorded",
        "the layers of a model in a row, causal, with a response's attention ratios recorded at one of them",
        _causal,
        {
            "cuda": {**LLM, "length": 3100, "response": 100, "layers": 32},
            # Short enough for eager attention maps of every layer.
            "cpu": {**LLM, "length": 500, "response": 60, "layers": 32},
            "small": {**TINY, "length": 96, "response": 12, "layers": 2},
        },
        FORWARD,
        recorded=True,
    ),
    _case("causal_8k", "the size at which others publish forward TFLOP/s", _causal, LONG, FORWARD),
    _case("causal_8k_backward", "the size at which others publish backward TFLOP/s", _causal, LONG, BACKWARD),
    _case("causal_8k_mass", "what mass of every row on five pictures costs in the same pass", _causal, LONG, FORWARD, mass=True),
    _case(
        "pair_mass",
        "a preference pair with mass of every row on five pictures",
        _pair,
        {
            "cuda": {**LLM, "prompt": 3000, "response": 100},
            # The only ways on the CPU are dense.
            "cpu": {**LLM, "prompt": 500, "response": 60},
            "small": SMALL_PAIR,
        },
        BOTH,
        mass=True,
    ),
    _case(
        "triple",
        "mDPO: the pair, and the chosen response again after the corrupted picture",
        _triple,
        {
            "cuda": {**LLM, "prompt": 3000, "response": 100},
            "cpu": {**LLM, "prompt": 700, "response": 60},
            "small": SMALL_PAIR,
        },
        BOTH,
    ),
    _case(
        "questions",
        "four questions about one set of pictures, two responses each",
        _questions,
        {
            "cuda": {**LLM, "prompt": 3000, "question": 60, "response": 100, "questions": 4},
            "cpu": {**LLM, "prompt": 500, "question": 40, "response": 60, "questions": 4},
            "small": {**SMALL_PAIR, "question": 8, "questions": 4},
        },
        BOTH,
    ),
)

VARIANTS = {WITHOUT_MASS: (partial(prepare, with_mass=False), None)}
"""What a name ends in -> what is prepared instead, and for which backends; None: all."""
COMPILED = (
    ("pair",),
    ("recorded", "causal_8k"),
    ("causal_8k_backward",),
    ("causal_8k_mass",),
    ("pair_mass",),
    ("triple",),
)
"""Cases that a GPU run compiles ahead of timing, a process for each group."""
