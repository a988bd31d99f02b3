"""Random calls of every attention backend that runs here, and properties that hold whatever the numbers.

`MMDPO_PROPERTY_CASES=10000` runs that many random calls over all backends and ops (`make nightly`), `MMDPO_PROPERTY_SEED=7` that one
of each.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import property_cases
import pytest
import torch
from devices import DEVICE
from property_cases import (
    DTYPES,
    LARGE_SCORES,
    check,
    fitted,
    is_slow_here,
    reason_not_here,
    run,
    served,
    tree_of,
    under_a_cap,
)
from torch import Tensor
from trees import LOOKING_AHEAD

from mmdpo_kernels import attention_mass, tree_attention
from mmdpo_kernels.backends import registry
from mmdpo_kernels.backends.ops_table import OPS

DRAWN = ("tree_attention", "attention_mass")
TOTAL = int(os.environ.get("MMDPO_PROPERTY_CASES", "240"))
BLOCK = 20 if TOTAL <= 1000 else 100
HERE = [(op, name) for op in DRAWN for name in OPS[op].backends if reason_not_here(op, name) is None]


def share(op: str, backend: str) -> float:
    """Part of the calls: few where each takes seconds, or where the backend is what others are measured by."""
    if is_slow_here(backend):
        return 0.2 if TOTAL > 1000 else 0.05
    return 0.5 if backend == "reference" else 1.0


def blocks() -> list[Any]:
    """(op, backend, seeds) of all random calls, in pieces that several processes can share."""
    one = os.environ.get("MMDPO_PROPERTY_SEED")
    if one is not None:
        return [pytest.param(*pair, range(int(one), int(one) + 1), id=f"{'-'.join(pair)}-{one}") for pair in HERE]
    found, whole = [], sum(share(*pair) for pair in HERE)
    for pair in HERE:
        count = round(TOTAL * share(*pair) / whole)
        # Few calls a piece where nearly every call has kernels of its own to compile or to interpret.
        size = max(1, BLOCK // 10) if pair[1] in ("triton", "flex") else BLOCK
        for start in range(0, count, size):
            seeds = range(start, min(start + size, count))
            found.append(pytest.param(*pair, seeds, id=f"{'-'.join(pair)}-{seeds.start}-{seeds.stop - 1}"))
    return found


@pytest.mark.parametrize(("op", "backend", "seeds"), blocks())
def test_random_calls(op: str, backend: str, seeds: range) -> None:
    failures = []
    for seed in seeds:
        try:
            run(op, backend, seed)
        except AssertionError as error:
            failures.append(str(error))
    if failures:
        pytest.fail(f"{len(failures)} of {len(seeds)} calls\n\n" + "\n\n".join(failures[:5]), pytrace=False)


CAPPED = [pair for pair in HERE if registry.load(*pair).unavailable_reason(DEVICE, torch.float32, softcap=True) is None]


@pytest.mark.parametrize(("op", "backend"), CAPPED, ids=["-".join(pair) for pair in CAPPED])
@pytest.mark.parametrize("length", [3, 17])
def test_large_scores_under_a_softcap(op: str, backend: str, length: int) -> None:
    """Where one score carries a row and where the cap takes all to one: three keys, in which nothing averages out, and more than a tile."""
    cases = LARGE_SCORES[1::3] if is_slow_here(backend) else LARGE_SCORES
    for spread, softcap in cases:
        for seed in range(1 if is_slow_here(backend) else 8):
            call = under_a_cap(op, length, spread, softcap, seed)
            check(fitted(call, op, backend, random.Random(seed)), backend, lse_kept=backend not in ("reference", "flex"))


def test_the_calls_of_a_seed_are_the_same_every_time() -> None:
    for op in DRAWN:
        one, other = (served(op, "reference", 5) for _ in range(2))
        assert one.traits == other.traits and one.options == other.options
        assert all(torch.equal(t, other.leaves[name]) for name, t in one.leaves.items())


# Each wrong backend below is wrong in one place only.

Forward = Callable[..., Any]


def field(name: str, change: Callable[[Any], Any], *, only: str = "") -> Callable[..., Any]:
    """A backend whose forward and backward, or only one of them, take a field of the call wrongly."""

    def wrong(op: str, function: str, original: Forward) -> Forward:
        if only and function != only:
            return original

        def changed(*args: Any) -> Any:
            *tensors, call = args
            value = getattr(call, name)
            return original(*tensors, call if value is None else call._replace(**{name: change(value)}))

        return changed

    return wrong


def keys(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A backend that takes the keys wrongly."""

    def wrong(op: str, function: str, original: Forward) -> Forward:
        # Upstream gradients come first, one or three.
        at = 1 if function == "forward" else 2 if op == "attention_mass" else 4
        return lambda *args: original(*args[:at], change(args[at]), *args[at + 1 :])

    return wrong


def without_upstream(position: int) -> Callable[..., Any]:
    """A tree_attention whose backward forgets one upstream gradient."""

    def wrong(op: str, name: str, original: Forward) -> Forward:
        if name == "forward":
            return original
        return lambda *args: original(*(None if at == position else value for at, value in enumerate(args)))

    return wrong


def result(change: Callable[[Tensor], Tensor], *, only: str) -> Callable[..., Any]:
    """A backend that spoils the first result."""

    def wrong(op: str, name: str, original: Forward) -> Forward:
        if name != only:
            return original

        def function(*args: Any) -> Any:
            found = original(*args)
            return change(found) if isinstance(found, Tensor) else (change(found[0]), *found[1:])

        return function

    return wrong


def unwritten_end(tensor: Tensor) -> Tensor:
    """Its last row was never written."""
    kept = torch.empty_like(tensor)
    kept[..., :-1, :] = tensor[..., :-1, :]
    return kept


WRONG: dict[str, Callable[..., Any]] = {
    "subtrees end one early": field("tree_end", lambda ends: (ends - 1).clamp(min=0)),
    "subtrees end one late": field("tree_end", lambda ends: (ends + 1).clamp(max=ends.shape[1])),
    "windows one too wide": field("window", lambda window: window + 1),
    "queries reach one too short": field("reach", lambda reach: reach - 1),
    "queries reach one too far": field("reach", lambda reach: reach + 1),
    "no reach in the backward": field("reach", lambda reach: None, only="backward"),
    "no softcap in the backward": field("softcap", lambda softcap: None, only="backward"),
    "another scale in the backward": field("scale", lambda scale: scale * 1.01, only="backward"),
    "segments one token off": field("segments", lambda segments: segments.roll(1, dims=1)),
    "the second key head first": keys(lambda key: key.flip(1)),
    "keys in half precision": keys(lambda key: key.half().to(key.dtype)),
    "last row not written": result(unwritten_end, only="forward"),
    "gradient of queries halved": result(lambda grad: grad / 2, only="backward"),
    "gradient of lse forgotten": without_upstream(1),
    "gradient of mass forgotten": without_upstream(2),
}


# The mass of chosen rows has one upstream gradient, which cannot be forgotten alone.
@pytest.mark.parametrize(
    ("op", "mistake"), [(op, name) for op in DRAWN for name in WRONG if "forgotten" not in name or op != DRAWN[1]]
)
def test_a_wrong_backend_is_caught(op: str, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = registry.load(op, "reference"), ModuleType("wrong")
    vars(wrong).update(vars(right))
    for name in ("forward", "backward"):
        setattr(wrong, name, WRONG[mistake](op, name, getattr(right, name)))

    def load(op: str, backend: str) -> ModuleType:
        return wrong

    monkeypatch.setattr(registry, "load", load)
    monkeypatch.setattr(property_cases, "load", load)
    with pytest.raises(
        AssertionError,
        match=rf"{op} reference seed \d+: .*(is off by|holds NaN).*\n.*\nrerun: MMDPO_PROPERTY_SEED=\d+ python -m pytest",
    ):
        for seed in range(40):
            run(op, "reference", seed)


def names_of(op: str) -> list[str]:
    return [name for its_op, name in HERE if its_op == op]


def dtype_of(op: str, backend: str) -> torch.dtype:
    """The first dtype that the backend serves."""
    module = registry.load(op, backend)
    return next(dtype for dtype in DTYPES if module.unavailable_reason(DEVICE, dtype) is None)


def close(got: Tensor, want: Tensor) -> None:
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-11}.get(want.dtype, 2e-2)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def random_tensors(length: int, dtype: torch.dtype, *, rows: int | None = None) -> list[Tensor]:
    """query (1, 4, rows, 32), key and value (1, 2, length, 32)."""
    shapes = [(1, 4, rows or length, 32), (1, 2, length, 32), (1, 2, length, 32)]
    return [torch.randn(shape).to(DEVICE, dtype) for shape in shapes]


def ends_of(ends: list[int]) -> Tensor:
    return torch.tensor([ends], dtype=torch.int32, device=DEVICE)


def outputs_of(query: Tensor, key: Tensor, tree_end: Tensor, backend: str) -> list[Tensor]:
    """Outputs as a list of tensors with tokens in dimension 2, whatever the backend serves."""
    out = tree_attention(query, key, key, tree_end, backend=backend)
    return [out.output, out.lse]


@pytest.mark.parametrize("backend", names_of("tree_attention"))
def test_swapping_siblings_swaps_their_rows(backend: str) -> None:
    prompt, left, right = 9, (3, [2, 4]), 5
    order = [*range(9), *range(18, 23), *range(9, 18)]
    query, key, _ = random_tensors(23, dtype_of("tree_attention", backend))
    before = outputs_of(query, key, ends_of(tree_of((prompt, [left, right]))), backend)
    after = outputs_of(query[:, :, order], key[:, :, order], ends_of(tree_of((prompt, [right, left]))), backend)
    for a, b in zip(before, after, strict=True):
        close(b, a[:, :, order])


@pytest.mark.parametrize("backend", names_of("tree_attention"))
def test_a_packed_tree_equals_its_sequences(backend: str) -> None:
    """Two examples in a row; the second has two questions of two answers each."""
    ends = tree_of((4, [3, 2]), (5, [(2, [3, 1]), (1, [2, 4])]))
    query, key, _ = random_tensors(len(ends), dtype_of("tree_attention", backend))
    packed = outputs_of(query, key, ends_of(ends), backend)
    for last in (6, 8, 18, 19, 22, 26):
        path = [j for j in range(len(ends)) if j <= last < ends[j]]
        alone = outputs_of(query[:, :, path], key[:, :, path], ends_of([len(path)] * len(path)), backend)
        for a, b in zip(packed, alone, strict=True):
            close(a[:, :, path], b)


@pytest.mark.parametrize("backend", names_of("tree_attention"))
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(backend: str, side: str) -> None:
    """Not even where it holds the largest numbers there are; nor does the gradient flow into it."""
    tree, pads = tree_of((6, [5, 3])), 5
    query, key, _ = random_tensors(14 + pads, dtype_of("tree_attention", backend))
    real = slice(pads, None) if side == "left" else slice(0, 14)
    pad = slice(0, pads) if side == "left" else slice(14, None)
    ends = [*range(pads), *(end + pads for end in tree)] if side == "left" else [*tree, *range(14, 14 + pads)]
    query[:, :, pad] = key[:, :, pad] = 1e4
    key.requires_grad_(registry.load("tree_attention", backend).unavailable_reason(DEVICE, key.dtype, gradient=True) is None)
    output, lse = outputs_of(query, key, ends_of(ends), backend)
    alone = outputs_of(query[:, :, real], key.detach()[:, :, real], ends_of(tree), backend)
    close(output[:, :, real], alone[0])
    close(lse[:, :, real], alone[1])
    assert (output[:, :, pad] == 0).all() and (lse[:, :, pad] == float("-inf")).all()
    if key.requires_grad:
        (grad,) = torch.autograd.grad(output.sum(), key)
        assert (grad[:, :, pad] == 0).all()


@pytest.mark.parametrize("backend", names_of("tree_attention"))
def test_mass_of_a_row_is_one_where_every_key_has_a_segment(backend: str) -> None:
    query, key, value = random_tensors(33, dtype_of("tree_attention", backend))
    tree_end = ends_of(tree_of((12, [7, (4, [6, 2])]), 2))
    segments = torch.randint(0, 18, (1, 33), device=DEVICE)
    try:
        mass = tree_attention(query, key, value, tree_end, segments=segments, num_segments=18, backend=backend).mass
    except ValueError as error:
        assert "cannot serve this call" in str(error)
        return
    close(mass.sum(-1), torch.ones_like(mass[..., 0]))


@pytest.mark.parametrize("backend", names_of("attention_mass"))
def test_mass_of_chosen_rows(backend: str) -> None:
    """It is one over all segments, the same for a branch by itself, and padding gets none."""
    ends = [*tree_of((12, [7, (4, [6, 2])])), *range(31, 36)]
    rows = torch.tensor([[0, 18, 30, -1, 25, 11]], device=DEVICE)
    query, key, _ = random_tensors(36, dtype_of("attention_mass", backend), rows=6)
    key[:, :, 31:] = 1e4
    segments = torch.randint(0, 18, (1, 36), device=DEVICE)

    def mass(rows: Tensor, keys: list[int], ends: list[int], which: list[int], **how: Any) -> Tensor:
        return attention_mass(
            query[:, :, which], key[:, :, keys], segments[:, keys], row_positions=rows, num_segments=18, tree_end=ends_of(ends),
            backend=backend, **how,
        )  # fmt: skip

    everything = list(range(36))
    found = mass(rows, everything, ends, [0, 1, 2, 3, 4, 5])
    assert (found[:, :, 3] == 0).all()
    used = [0, 1, 2, 4, 5]
    close(found[:, :, used].sum(-1), torch.ones_like(found[:, :, used, 0]))
    heat = mass(rows, everything, ends, [0, 1, 2, 3, 4, 5], reduce="tokens")
    close(heat.sum(1), torch.ones_like(heat[:, 0]))
    assert (heat[:, 31:] == 0).all()
    for row, last in ((1, 18), (2, 30), (4, 25)):
        path = [j for j in range(31) if j <= last < ends[j]]
        alone = mass(torch.tensor([[len(path) - 1]], device=DEVICE), path, [len(path)] * len(path), [row])
        close(found[:, :, row : row + 1], alone)


def test_seeds_reach_what_they_should() -> None:
    """Over the modest number of seeds every tree, segment map and layout comes up, and every feature both ways."""
    rng = random.Random(0)
    calls = [property_cases.draw(op, seed, rng.choice(DTYPES)) for op in DRAWN for seed in range(160)]
    traits = {trait.split(" segments ")[-1] for call in calls for trait in call.traits}
    assert traits >= {*property_cases.TREES, *property_cases.SEGMENTS, *property_cases.LAYOUTS, "lse given"}
    assert traits >= {"no reach", *(f"reach of {kind}" for kind in LOOKING_AHEAD)}
    for name in ("softcap", "window", "scale"):
        assert {call.options[name] is None for call in calls} == {True, False}
    assert {call.num_segments > 16 for call in calls} == {True, False}
    assert len({call.wanted for call in calls}) == 7 + 3 - 1  # subsets of query, key, value and of query_rows, key
    assert len({call.upstream for call in calls}) == 7
