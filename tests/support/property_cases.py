"""Random calls of `tree_attention` and `attention_mass`, one a seed, and what they must give, written independently of the backends.

`run(op, backend, seed)` draws a call that the backend serves, runs it, and checks outputs and gradients under the accuracy rule.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from devices import DEVICE
from torch import Tensor
from trees import LOOKING_AHEAD, random_tree_end, with_reach

from mmdpo_kernels import attention_mass, tree_attention
from mmdpo_kernels.backends.registry import load

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# One token, one less and one more than the block sizes of kernels, and odd numbers.
LENGTHS = (1, 2, 3, 7, 16, 17, 31, 33, 48, 64, 65, 97, 130)
HEAD_DIMS = (8, 16, 24, 32, 40, 64, 80, 96, 128)
# Sizes for kernels that an interpreter runs program by program.
SMALL_LENGTHS, SMALL_HEAD_DIMS = (1, 2, 7, 16, 17, 33), (16, 32, 40, 64)
SEGMENT_COUNTS = (1, 2, 3, 5, 16, 17, 21)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call: leaf tensors (views of any strides), integer tensors, options, and which gradients flow."""

    leaves: dict[str, Tensor]
    """query, key and value; or query_rows and key."""
    tree_end: Tensor | None
    segments: Tensor | None
    num_segments: int
    options: dict[str, Any]
    """scale, softcap, window; for `attention_mass` reduce as well."""
    wanted: frozenset[str]
    """Leaves that need a gradient."""
    upstream: frozenset[str]
    """Outputs that have one."""
    reach: Tensor | None = None
    row_positions: Tensor | None = None
    lse: Tensor | None = None
    traits: tuple[str, ...] = ()
    """How it was drawn, for the message of a failure."""


def draw(op: str, seed: int, dtype: torch.dtype, *, small: bool = False) -> Call:
    """The call of a seed: the same on every machine."""
    rng = random.Random(f"{op} {seed}")
    batch, kv_heads = rng.choice((1, 2) if small else (1, 1, 2, 3)), rng.choice((1, 1, 2) if small else (1, 1, 2, 3))
    heads = kv_heads * rng.choice((1, 2) if small else (1, 1, 2, 3, 4))
    dims = SMALL_HEAD_DIMS if small else HEAD_DIMS
    dim, length = rng.choice(dims), rng.choice(SMALL_LENGTHS if small else LENGTHS)
    traits = []
    window = rng.choice((None, None, None, 1, 3, length // 2 + 1, length + 5))
    tree = rng.choice([name for name in TREES if op == "attention_mass" and window is None or name != "intervals"])
    traits.append(tree)
    tree_end = TREES[tree](rng, batch, length)
    if tree_end is not None:
        tree_end = tree_end.to(rng.choice((torch.int32, torch.int32, torch.int64)))
    tree_end, reach, looks = _looking_ahead(seed, tree_end, batch, length)
    traits.append(looks)
    kind = rng.choice(list(SEGMENTS)) if op == "tree_attention" else rng.choice([name for name in SEGMENTS if name != "absent"])
    count = 0 if kind == "absent" else rng.choice(SEGMENT_COUNTS)
    segments = SEGMENTS[kind](rng, batch, length, count)
    traits.append(f"{count} segments {kind}")
    generator = torch.Generator().manual_seed(seed)
    spread = rng.choice((1.0, 1.0, 2.0))

    def numbers(*shape: int) -> Tensor:
        return (spread * torch.randn(shape, generator=generator)).to(DEVICE, dtype)

    def leaf(heads: int, length: int, dim: int) -> Tensor:
        layout = rng.choice(list(LAYOUTS))
        traits.append(layout)
        return LAYOUTS[layout](batch, heads, length, dim, numbers)

    options: dict[str, Any] = {
        "scale": rng.choice((None, None, 0.3, 1.0)),
        "softcap": rng.choice((None, None, 2.0, 30.0)),
        "window": window,
    }
    common: dict[str, Any] = {
        "tree_end": tree_end,
        "reach": reach,
        "segments": segments,
        "num_segments": count,
        "options": options,
    }
    if op == "tree_attention":
        value_dim = rng.choice((dim, dim, dim, rng.choice(dims)))
        leaves = {
            "query": leaf(heads, length, dim),
            "key": leaf(kv_heads, length, dim),
            "value": leaf(kv_heads, length, value_dim),
        }
        outputs = ["output", "lse", "mass"] if count else ["output", "lse"]
        call = Call(leaves=leaves, wanted=_subset(rng, leaves), upstream=_subset(rng, outputs), **common)
    else:
        rows = rng.choice((1, 2, 5, 9 if small else 40))
        options["reduce"] = rng.choice((None, None, "mean", "tokens"))
        positions = torch.tensor([[rng.randrange(-1, length) for _ in range(rows)] for _ in range(batch)])
        leaves = {"query_rows": leaf(heads, rows, dim), "key": leaf(kv_heads, length, dim)}
        call = Call(
            leaves=leaves, wanted=_subset(rng, leaves), upstream=frozenset(["mass"]), **common,
            row_positions=positions.to(rng.choice((torch.int32, torch.int64))),
        )  # fmt: skip
        if rng.random() < 0.3:
            call = replace(call, lse=_lse_of_rows(call))
            traits.append("lse given")
    return replace(_on_device(call), traits=tuple(traits))


def _looking_ahead(seed: int, tree_end: Tensor | None, batch: int, length: int) -> tuple[Tensor | None, Tensor | None, str]:
    """In two of five calls, a `reach`, the tree that goes with it, and how it was drawn: with a chance of its own, beside what else is drawn."""
    rng = random.Random(f"reach {seed}")
    if rng.random() > 0.4:
        return tree_end, None, "no reach"
    kind = rng.choice(LOOKING_AHEAD)
    given = torch.full((batch, length), length) if tree_end is None else tree_end
    ends, reach = with_reach(given, seed, kind=kind)
    dtype = rng.choice((torch.int32, torch.int32, torch.int64))
    return None if tree_end is None else ends.to(tree_end.dtype), reach.to(dtype), f"reach of {kind}"


# Of scores, and the cap above them: below it, about it, and so far above that tanh is 1.
LARGE_SCORES = [(spread, softcap) for spread in (1.0, 10.0, 100.0, 1000.0) for softcap in (5.0, 50.0)]


def under_a_cap(op: str, length: int, spread: float, softcap: float, seed: int) -> Call:
    """A causal float32 call under a softcap, with scores of about `spread`, all gradients through all outputs."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, heads, length, 16, generator=generator) for heads in (2, 1, 1))
    segments = torch.arange(length)[None] % 2
    outputs = ["output", "lse", "mass"] if op == "tree_attention" else ["mass"]
    leaves = (
        {"query": spread * query, "key": key, "value": value}
        if op == "tree_attention"
        else {"query_rows": spread * query, "key": key}
    )
    options: dict[str, Any] = {"scale": None, "softcap": softcap, "window": None}
    call = Call(
        leaves={name: t.to(DEVICE) for name, t in leaves.items()}, tree_end=None, segments=segments, num_segments=2, options=options,
        wanted=frozenset(leaves), upstream=frozenset(outputs),
    )  # fmt: skip
    if op == "attention_mass":
        call = replace(call, row_positions=torch.arange(length)[None], options={**options, "reduce": None})
    return _on_device(call)


def _subset(rng: random.Random, names: Any) -> frozenset[str]:
    """A random subset that is not empty."""
    ordered = sorted(names)
    return frozenset(rng.sample(ordered, rng.randint(1, len(ordered))))


def _on_device(call: Call) -> Call:
    moved = {name: getattr(call, name) for name in ("tree_end", "reach", "segments", "row_positions", "lse")}
    return replace(call, **{name: None if t is None else t.to(DEVICE) for name, t in moved.items()})


def _lse_of_rows(call: Call) -> Tensor:
    """What an attention kernel would have left behind: float32, float64 for float64."""
    leaves = {name: t.double() for name, t in call.leaves.items()}
    wide = torch.promote_types(call.leaves["key"].dtype, torch.float32)
    return _softmax(leaves["query_rows"], leaves["key"], _seen(call), call)[1].to(wide)


def tree_of(*roots: Any) -> list[int]:
    """`tree_end` of nodes, each a length or (length, children)."""
    ends: list[int] = []

    def lay(node: Any) -> None:
        length, children = node if isinstance(node, tuple) else (node, ())
        start = len(ends)
        ends.extend([-1] * length)
        for child in children:
            lay(child)
        ends[start : start + length] = [len(ends)] * length

    for root in roots:
        lay(root)
    return ends


def _shaped(rng: random.Random, batch: int, length: int, branches: int, depth: int = 1) -> Tensor:
    """Rows that share a prompt: `branches` answers of it, or at depth 2 of each of `branches` questions."""
    rows = []
    for _ in range(batch):
        leaves = branches * (2 if depth == 2 else 1)
        sizes = [rng.randint(0, max(0, length // (leaves + 1))) for _ in range(leaves + (branches if depth == 2 else 0))]
        used = sum(sizes)
        answers = iter(sizes)
        children: list[Any] = [
            (next(answers), [next(answers), next(answers)]) if depth == 2 else next(answers) for _ in range(branches)
        ]
        if used < length:
            rows.append(tree_of((length - used, children)))
        else:
            rows.append(tree_of(length))
    return torch.tensor(rows, dtype=torch.int32)


def _padded(rng: random.Random, batch: int, length: int, side: str) -> Tensor:
    index = torch.arange(length)
    real = torch.tensor([rng.randint(0, length) for _ in range(batch)])[:, None]
    if side == "right":
        return torch.where(index < real, real, index).to(torch.int32)
    return torch.where(index >= length - real, length, index).to(torch.int32)


def _with_holes(rng: random.Random, batch: int, length: int) -> Tensor:
    """Tokens in the middle that nobody sees, such as masked image tokens."""
    tree_end = random_tree_end(batch, length, rng.randrange(2**30))
    hidden = torch.tensor([[rng.random() < 0.3 for _ in range(length)] for _ in range(batch)]).view(batch, length)
    return torch.where(hidden, torch.arange(length), tree_end).to(torch.int32)


def _intervals(rng: random.Random, batch: int, length: int) -> Tensor:
    """Ends that do not nest, which the rule allows: a recorded window is one."""
    ends = [[rng.randint(j, length) for j in range(length)] for _ in range(batch)]
    return torch.tensor(ends, dtype=torch.int32).view(batch, length)


TREES: dict[str, Callable[[random.Random, int, int], Tensor | None]] = {
    "causal": lambda rng, b, s: None,
    "causal tree": lambda rng, b, s: torch.full((1, 1), s, dtype=torch.int32).expand(b, s),
    "random": lambda rng, b, s: random_tree_end(b, s, rng.randrange(2**30)),
    "random, one tree for all": lambda rng, b, s: random_tree_end(1, s, rng.randrange(2**30)).expand(b, s),
    "pair": lambda rng, b, s: _shaped(rng, b, s, 2),
    "triple": lambda rng, b, s: _shaped(rng, b, s, 3),
    "four questions": lambda rng, b, s: _shaped(rng, b, s, 4, 2),
    "left padding": lambda rng, b, s: _padded(rng, b, s, "left"),
    "right padding": lambda rng, b, s: _padded(rng, b, s, "right"),
    "all padding": lambda rng, b, s: torch.arange(s, dtype=torch.int32).expand(b, s),
    "each token a root": lambda rng, b, s: (torch.arange(s, dtype=torch.int32) + 1).expand(b, s),
    "holes": _with_holes,
    "intervals": _intervals,
}

SEGMENTS: dict[str, Callable[[random.Random, int, int, int], Tensor | None]] = {
    "absent": lambda rng, b, s, n: None,
    "contiguous": lambda rng, b, s, n: (torch.arange(s) * n // max(s, 1)).expand(b, s).to(torch.int32),
    "interleaved": lambda rng, b, s, n: (torch.arange(s) % n).expand(b, s),
    "scattered": lambda rng, b, s, n: torch.tensor(
        [[rng.randrange(-1, n) for _ in range(s)] for _ in range(b)], dtype=torch.int32
    ),
    "none": lambda rng, b, s, n: torch.full((b, s), -1, dtype=torch.int32),
    "all one": lambda rng, b, s, n: torch.full((b, s), n - 1, dtype=torch.int32),
}

Make = Callable[..., Tensor]
# Views of memory as models, slices and broadcasts leave it: (B, H, S, D) each.
LAYOUTS: dict[str, Callable[[int, int, int, int, Make], Tensor]] = {
    "dense": lambda b, h, s, d, make: make(b, h, s, d),
    "heads inside": lambda b, h, s, d, make: make(b, s, h, d).transpose(1, 2),
    "dims outside": lambda b, h, s, d, make: make(b, h, d, s).transpose(2, 3),
    "every other dim": lambda b, h, s, d, make: make(b, h, s, 2 * d)[..., ::2],
    "part of a fused projection": lambda b, h, s, d, make: make(b, s, 3, h, d)[:, :, 1].transpose(1, 2),
    "every other token, from the third": lambda b, h, s, d, make: make(b, h, 2 * s + 2, d)[:, :, 2::2],
    "one head for all": lambda b, h, s, d, make: make(b, 1, s, d).expand(-1, h, -1, -1),
    "one row for the batch": lambda b, h, s, d, make: make(1, h, s, d).expand(b, -1, -1, -1),
}


def _seen(call: Call) -> Tensor:
    """(B, R, S) bool: which keys each query sees, the rule spelled out."""
    key = call.leaves["key"]
    batch, length = key.shape[0], key.shape[2]
    keys = torch.arange(length, device=key.device)
    rows = keys.expand(batch, -1) if call.row_positions is None else call.row_positions.to(key.device)
    ends = torch.full((batch, length), length, device=key.device) if call.tree_end is None else call.tree_end.to(key.device)
    in_subtree = (rows[..., None] < ends[:, None]) & (rows[..., None] >= 0)
    seen = in_subtree & (keys <= rows[..., None])
    if call.options["window"] is not None:
        later = seen.flip(-1).cumsum(-1).flip(-1) - seen.long()
        seen &= later < call.options["window"]
    if call.reach is not None:
        # What lies ahead is in every window.
        stops = call.reach.to(key.device).long().gather(1, rows.long().clamp(min=0))[..., None]
        seen |= in_subtree & (keys > rows[..., None]) & (keys < stops)
    return seen


def _softmax(query: Tensor, key: Tensor, seen: Tensor, call: Call, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: probabilities (B, Hq, R, S), zero where nothing is seen, and lse (B, Hq, R), both in float32 or wider.

    given: an lse (B, Hq, R) to make the probabilities from.
    """
    scale, softcap = call.options["scale"], call.options["softcap"]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    some = seen.any(-1)[:, None]
    scores = torch.where(some[..., None], scores.masked_fill(~seen[:, None], float("-inf")), 0.0)
    lse = scores.logsumexp(-1)
    if given is None:
        probabilities = scores.softmax(-1)
    else:
        # The value of the one given, and the gradient of the one that it stands for.
        value = torch.where(some, given.to(lse.dtype), lse.detach())
        probabilities = torch.exp(scores - (value + (lse - lse.detach()))[..., None])
    return probabilities * some[..., None], torch.where(some, lse, float("-inf"))


def expected(call: Call, leaves: dict[str, Tensor], given: Tensor | None = None) -> dict[str, Tensor]:
    """The outputs in plain PyTorch, in the dtype of `leaves`, differentiable. given: an lse to make probabilities from, as `_softmax` does."""
    query = leaves["query"] if "query" in leaves else leaves["query_rows"]
    probabilities, lse = _softmax(query, leaves["key"], _seen(call), call, given)
    one_hot = torch.zeros(*probabilities.shape[:1], 1, probabilities.shape[3], call.num_segments, device=query.device)
    if call.segments is not None:
        one_hot = (call.segments[:, None, :, None] == torch.arange(call.num_segments, device=query.device)).to(one_hot.dtype)
    mass = probabilities @ one_hot.to(probabilities.dtype)
    if "value" in leaves:
        value = leaves["value"].repeat_interleave(query.shape[1] // leaves["value"].shape[1], 1)
        return {"output": probabilities.to(value.dtype) @ value, "lse": lse, "mass": mass}
    assert call.row_positions is not None
    weight = ((call.row_positions >= 0).sum(1) * query.shape[1]).clamp(min=1)[:, None]
    found = {None: mass, "mean": mass.sum((1, 2)) / weight, "tokens": probabilities.sum((1, 2)) / weight}
    return {"mass": found[call.options["reduce"]]}


def actual(call: Call, leaves: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """The outputs of a backend through the public op."""
    if "value" in leaves:
        out = tree_attention(
            **leaves,
            tree_end=call.tree_end,
            reach=call.reach,
            segments=call.segments,
            num_segments=call.num_segments,
            **call.options,
            backend=backend,
        )
        return out._asdict()
    assert call.segments is not None and call.row_positions is not None
    found = attention_mass(
        **leaves, segments=call.segments, row_positions=call.row_positions, num_segments=call.num_segments, tree_end=call.tree_end,
        reach=call.reach, lse=call.lse, **call.options, backend=backend,
    )  # fmt: skip
    return {"mass": found}


def reason_not_here(op: str, backend: str) -> str | None:
    """Why the backend serves no dtype on this machine, or None."""
    reasons = [load(op, backend).unavailable_reason(DEVICE, dtype) for dtype in DTYPES]
    return None if None in reasons else reasons[0]


def run(op: str, backend: str, seed: int) -> Call:
    """Draw the seed's call, drop what the backend does not serve, and check it. Returns the call that ran."""
    call = served(op, backend, seed)
    try:
        check(call, backend)
    except Exception as error:
        rerun = f"MMDPO_PROPERTY_SEED={seed} python -m pytest tests/kernels/test_properties.py -k 'random_calls and {op} and {backend}'"
        shapes = {name: tuple(t.shape) for name, t in call.leaves.items()}
        dtype = str(call.leaves["key"].dtype)
        raise AssertionError(
            f"{op} {backend} seed {seed}: {error}\n{dtype} {shapes} {call.options} {', '.join(call.traits)}, "
            f"gradients {sorted(call.wanted)} from {sorted(call.upstream)}\nrerun: {rerun}"
        ) from error
    return call


def is_slow_here(backend: str) -> bool:
    """Whether a call takes seconds: Triton's interpreter, and FlexAttention, which is traced anew for every kind of call."""
    return backend == "flex" or (backend == "triton" and DEVICE == "cpu")


def served(op: str, backend: str, seed: int) -> Call:
    """The seed's call in a dtype that the backend takes, without the features that it lacks."""
    rng = random.Random(f"{op} {backend} {seed}")
    module = load(op, backend)
    dtypes = [dtype for dtype in DTYPES if module.unavailable_reason(DEVICE, dtype) is None]
    call = draw(op, seed, rng.choice(dtypes), small=is_slow_here(backend))
    return fitted(call, op, backend, rng)


def fitted(call: Call, op: str, backend: str, rng: random.Random) -> Call:
    """The call without the features that the backend lacks."""
    dropped = rng.sample(list(DROPS), len(DROPS)) if _refusal(call, op, backend) else []
    # Drop everything, then give back what can stay.
    for name in list(dropped):
        kept = [other for other in dropped if other != name]
        if _refusal(_without(call, kept), op, backend) is None:
            dropped = kept
    call = _without(call, dropped)
    assert (refusal := _refusal(call, op, backend)) is None, refusal
    return replace(call, traits=(*call.traits, *(f"without {name}" for name in dropped)))


def _without(call: Call, names: list[str]) -> Call:
    for name in names:
        call = DROPS[name](call)
    return call


def _with_gradients(call: Call, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().requires_grad_(name in call.wanted) for name, t in leaves.items()}


class _Served(Exception):  # noqa: N818 - control flow, not an error
    pass


def _refusal(call: Call, op: str, backend: str) -> str | None:
    """Why the op refuses the call, or None where it would reach the backend."""
    try:
        with mock.patch.object(load(op, backend), "forward", side_effect=_Served):
            actual(call, _with_gradients(call, call.leaves), backend)
    except _Served:
        return None
    except ValueError as error:
        if "cannot serve this call" in str(error):
            return str(error)
        raise
    raise AssertionError(f"{op}: {backend} was not called")


def _same_dims(call: Call) -> Call:
    leaves = {**call.leaves}
    if "value" in leaves:
        leaves["value"] = leaves["key"].flip(3)
    return replace(call, leaves=leaves)


def _common_dim(call: Call) -> Call:
    """Head dim 64, which every kernel has: dims are repeated."""
    index = torch.arange(64, device=call.leaves["key"].device)
    return replace(call, leaves={name: t[..., index % t.shape[3]] for name, t in call.leaves.items()})


def _without_mass(call: Call) -> Call:
    if "value" not in call.leaves:
        return call
    return replace(call, segments=None, num_segments=0, upstream=(call.upstream - {"mass"}) or frozenset(["output"]))


DROPS: dict[str, Callable[[Call], Call]] = {
    "softcap": lambda call: replace(call, options={**call.options, "softcap": None}),
    "window": lambda call: replace(call, options={**call.options, "window": None}),
    "reach": lambda call: replace(call, reach=None),
    "mass": _without_mass,
    "value dim": _same_dims,
    "head dim": _common_dim,
    "gradients": lambda call: replace(call, wanted=frozenset()),
}


def check(call: Call, backend: str, *, lse_kept: bool = True) -> None:
    """Outputs and gradients against float64: as accurate as plain PyTorch in the call's dtype.

    lse_kept: whether probabilities may be made from a rounded lse, which moves them by a rounding step of the scores.

    The rule of `trees.assert_accurate`, with two changes that random calls in their thousands ask for: the error of plain PyTorch is its
    largest in the tensor, since it hits single entries by luck, and the rounding step is that of the largest sum of absolute terms, since
    gradients may cancel to zero.

    Where an lse is given, plain PyTorch is `exp(scores - lse)` as well, its products in float32: rounding of scores does not cancel there as
    it does in a softmax, and dots of many dims, whose terms are larger than what they sum to, lose more than a rounding step of a score.
    """
    with _nan_filled():
        ours = _evaluate(call, call.leaves, lambda leaves: actual(call, leaves, backend))
    wide = {name: t.double() for name, t in call.leaves.items()}
    truth = _evaluate(call, wide, lambda leaves: expected(call, leaves))
    plain = _evaluate(call, call.leaves, lambda leaves: expected(call, leaves))
    plains = [plain]
    if call.lse is not None:
        at_least_float32 = {name: t.to(torch.promote_types(t.dtype, torch.float32)) for name, t in call.leaves.items()}
        plains.append(_evaluate(call, at_least_float32, lambda leaves: expected(call, leaves, call.lse)))
    steps = _rounding_steps(call, wide, {name: t.dtype for name, t in plain.items()}, lse_kept=lse_kept)
    assert ours.keys() == truth.keys()
    for name, want in truth.items():
        got, usual = ours[name], plain[name]
        assert got.shape == want.shape, f"{name} has shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        assert got.dtype == usual.dtype, f"{name} is {got.dtype}, expected {usual.dtype}"
        assert not got.isnan().any(), f"{name} holds NaN"
        finite = want.isfinite()
        assert torch.equal(got[~finite].double(), want[~finite]), f"{name} where no key is seen"
        if finite.any():
            allowed = 2 * max((want - each[name].double())[finite].abs().max() for each in plains) + steps[name]
            error = (want - got.double())[finite].abs().max()
            assert error <= allowed, f"{name} is off by {error.item():.2e}, the rule allows {allowed.item():.2e}"


def _upstream(name: str, output: Tensor) -> Tensor:
    """A fixed gradient for an output; rows that see nothing have no lse to differentiate."""
    found = torch.randn(output.shape, generator=torch.Generator().manual_seed(len(name)))
    return found.to(output.device, output.dtype).masked_fill(~output.detach().isfinite(), 0.0)


def _evaluate(
    call: Call, leaves: dict[str, Tensor], outputs_of: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Outputs, and gradients of the wanted leaves."""
    leaves = _with_gradients(call, leaves)
    outputs = outputs_of(leaves)
    given = {name: outputs[name] for name in sorted(call.upstream) if outputs[name].requires_grad}
    wanted = sorted(call.wanted)
    grads: Any = [None] * len(wanted)
    if given:
        ups = [_upstream(name, output) for name, output in given.items()]
        grads = torch.autograd.grad(list(given.values()), [leaves[name] for name in wanted], ups, allow_unused=True)
    filled = [torch.zeros_like(leaves[name]) if grad is None else grad for name, grad in zip(wanted, grads, strict=True)]
    return {
        **{name: t.detach() for name, t in outputs.items()},
        **{f"gradient of {name}": grad for name, grad in zip(wanted, filled, strict=True)},
    }


@torch.no_grad()
def _rounding_steps(call: Call, leaves: dict[str, Tensor], dtypes: dict[str, torch.dtype], *, lse_kept: bool) -> dict[str, float]:
    """Per tensor one rounding of its largest sum of absolute terms in its own dtype, and one of each score where scores are kept.

    leaves: float64. A float64 call has truth in its own dtype only, whose roundings count as well.
    """
    query, key = leaves.get("query", leaves.get("query_rows")), leaves["key"]
    assert query is not None
    groups, scale = query.shape[1] // key.shape[1], abs(call.options["scale"] or query.shape[-1] ** -0.5)
    absolute = {name: t.abs() for name, t in leaves.items()}
    probabilities, _ = _softmax(query, key, _seen(call), call)
    scores = absolute["key"].repeat_interleave(groups, 1)
    scores = (query.abs() @ scores.mT * scale * (probabilities > 0)).amax(-1, keepdim=True)
    if call.options["softcap"] is not None:
        # Under the cap a score's own rounding counts by the slope, and score times slope stays below the cap.
        scores = scores.clamp(max=call.options["softcap"])
    ups = {name: _upstream(name, output).abs() for name, output in expected(call, leaves).items() if name in call.upstream}
    terms = _absolute_terms(probabilities, absolute, ups, groups, scale)
    of_scores = _absolute_terms(probabilities * scores, absolute, ups, groups, scale)
    of_scores["lse"] = terms["lse"] = scores.amax().item() + 1
    accumulated = torch.finfo(torch.promote_types(call.leaves["key"].dtype, torch.float32)).eps
    if not lse_kept:
        of_scores = dict.fromkeys(of_scores, 0.0)
    times = 16 if call.leaves["key"].dtype == torch.float64 else 1
    return {
        name: times * (torch.finfo(dtype).eps * terms[name] + accumulated * of_scores[name]) for name, dtype in dtypes.items()
    }


def _absolute_terms(
    probabilities: Tensor, leaves: dict[str, Tensor], ups: dict[str, Tensor], groups: int, scale: float
) -> dict[str, float]:
    """The formulas of forward and backward with a plus sign for every minus: largest entry of each."""
    key = leaves["key"].repeat_interleave(groups, 1)
    query_name = "query" if "query" in leaves else "query_rows"
    found = {"mass": probabilities.sum(-1)}
    flow = torch.zeros_like(probabilities)
    if "value" in leaves:
        value = leaves["value"].repeat_interleave(groups, 1)
        found["output"] = probabilities @ value
        found["gradient of value"] = torch.zeros_like(value)
        if "output" in ups:
            flow += ups["output"] @ value.mT
            found["gradient of value"] = _over_group(probabilities.mT @ ups["output"], groups)
    if "mass" in ups and ups["mass"].numel():
        flow += ups["mass"].amax()
    rows = (probabilities * flow).sum(-1, keepdim=True)
    if "lse" in ups:
        rows = rows + ups["lse"][..., None]
    slopes = probabilities * (flow + rows) * scale
    found[f"gradient of {query_name}"] = slopes @ key
    found["gradient of key"] = _over_group(slopes.mT @ leaves[query_name], groups)
    return {name: t.amax().item() for name, t in found.items()}


def _over_group(tensor: Tensor, groups: int) -> Tensor:
    return tensor.unflatten(1, (-1, groups)).sum(2)


@contextmanager
def _nan_filled() -> Iterator[None]:
    """What nobody writes is NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
