"""`tree_attention` in Triton: on the GPU where there is one, else interpreted. Small tiles bring calls of few tokens to many blocks."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import DEVICE
from property_cases import Call, check
from torch import Tensor
from trees import random_tree_end, with_reach
from triton.runtime import _allocation

from mmdpo_kernels import tree_attention
from mmdpo_kernels.backends import measured
from mmdpo_kernels.backends.calls import TreeAttentionCall
from mmdpo_kernels.backends.triton import measured_tiles, tree_plan
from mmdpo_kernels.backends.triton import tree_attention as backend
from mmdpo_kernels.backends.triton import tree_attention_tiles as tiles
from mmdpo_kernels.backends.triton.launch import Launch
from mmdpo_kernels.backends.triton.tree_attention_tiles import Tiles
from mmdpo_kernels.tree_mask import visible

SQUARE, TALL, WIDE = (Tiles(m, n, 4, 2) for m, n in ((16, 16), (32, 16), (16, 32)))
DESCRIBED = replace(TALL, descriptors=True)
PARTED = replace(DESCRIBED, specialize=True)
HALF = {"dtype": torch.bfloat16}

# A prompt of one block, a branch of one that the next branch must skip, a branch that ends inside a block, padding.
BRANCHES = [50] * 16 + [32] * 16 + [50] * 18 + [50, 51, 52]
# None, one segment for a whole block, then two in turn: every kind of key block.
PICTURES = [-1] * 16 + [0] * 20 + [1, 2] * 8 + [-1]

# The same tree with tokens that nobody sees at 0: a picture in the prompt, one that is its branch, one from block to block, one hidden token.
HIDDEN = [0 if token == 36 or token >= 50 else end for token, end in enumerate(BRANCHES)]
LOOK_AHEAD = [
    {**dict.fromkeys(range(3, 14), 14), **dict.fromkeys(range(16, 32), 32), **dict.fromkeys(range(34, 50), 50)}.get(i, i + 1)
    for i in range(53)
]
# A picture over three blocks in front of two branches, and another root that is a prefix.
LONG = {
    "ends": [48] * 36 + [40] * 4 + [48] * 8 + [70] * 22,
    "reach": [*[1, 2], *[35] * 33, *range(36, 49), *[66] * 18, *range(67, 71)],
}


def call(
    length: int,
    dims: tuple[int, int] = (16, 16),
    heads: tuple[int, int] = (2, 1),
    dtype: torch.dtype = torch.float32,
    ends: list[int] | None = None,
    segments: list[int] | None = None,
    reach: list[int] | None = None,
    upstream: tuple[str, ...] = ("output", "lse"),
    **options: Any,
) -> Call:
    """Heads last but one in memory, as models have them."""
    shapes = {"query": (heads[0], dims[0]), "key": (heads[1], dims[0]), "value": (heads[1], dims[1])}
    leaves = {name: torch.randn(1, length, h, dim).transpose(1, 2).to(DEVICE, dtype) for name, (h, dim) in shapes.items()}
    given = (("ends", ends), ("segments", segments), ("reach", reach))
    row = {name: None if v is None else torch.tensor([v], device=DEVICE) for name, v in given}
    return Call(
        leaves=leaves,
        tree_end=row["ends"],
        reach=row["reach"],
        segments=row["segments"],
        num_segments=0 if segments is None else max(segments) + 1,
        options={"scale": None, "softcap": None, "window": None, **options},
        wanted=frozenset(leaves),
        upstream=frozenset(upstream),
    )


ALL = ("output", "lse", "mass")
CASES: dict[str, tuple[Tiles, dict[str, Any]]] = {
    "one token": (SQUARE, {"length": 1}),
    "ragged last block, wide heads padded to a power of two": (SQUARE, {"length": 37, "dims": (24, 40)}),
    "whole blocks, tall tiles": (TALL, {"length": 64}),
    "ragged, wide tiles": (WIDE, {"length": 50, "heads": (3, 1)}),
    "a branch skips its sibling's block": (SQUARE, {"length": 53, "ends": BRANCHES}),
    "a branch skips its sibling's block, tall tiles": (TALL, {"length": 53, "ends": BRANCHES}),
    "no row sees anything": (SQUARE, {"length": 18, "ends": list(range(18))}),
    "window over indices": (SQUARE, {"length": 50, "window": 20}),
    "window along branches": (WIDE, {"length": 53, "ends": BRANCHES, "window": 20}),
    "softcap": (SQUARE, {"length": 20, "ends": [20] * 10 + [15] * 5 + [20] * 5, "softcap": 2.0}),
    "segments": (SQUARE, {"length": 53, "ends": BRANCHES, "segments": PICTURES, "upstream": ALL}),
    "segments, causal, wide tiles": (WIDE, {"length": 53, "segments": PICTURES, "heads": (1, 1), "upstream": ALL}),
    "more segments than fit in a pass": (SQUARE, {"length": 20, "segments": [*range(20)], "heads": (1, 1), "upstream": ALL}),
    "bfloat16": (WIDE, {"length": 40, "dtype": torch.bfloat16, "segments": PICTURES[:40], "heads": (1, 1), "upstream": ALL}),
    "float16": (SQUARE, {"length": 37, "dtype": torch.float16}),
    "reach": (SQUARE, {"length": 53, "ends": HIDDEN, "reach": LOOK_AHEAD}),
    "reach, window and softcap": (WIDE, {"length": 53, "ends": HIDDEN, "reach": LOOK_AHEAD, "window": 9, "softcap": 2.0}),
    "reach over many blocks": (SQUARE, {"length": 70, **LONG, "heads": (3, 1)}),
    "reach, segments, tall tiles": (
        TALL,
        {"length": 53, "ends": HIDDEN, "reach": LOOK_AHEAD, "segments": PICTURES, "upstream": ALL},
    ),
    "reach without a tree": (WIDE, {"length": 50, "reach": [40] * 40 + list(range(41, 51)), "window": 30}),
    "descriptors, ragged last block, wide heads": (DESCRIBED, {"length": 37, "dims": (24, 40)}),
    "descriptors, bfloat16 in rows of no whole 16 bytes": (DESCRIBED, {"length": 20, "dims": (20, 20), "heads": (1, 1), **HALF}),
    "overlap": (replace(WIDE, overlap=True), {"length": 53, "ends": BRANCHES, "heads": (3, 1)}),
    "overlap, descriptors, segments": (
        replace(DESCRIBED, overlap=True),
        {"length": 53, "ends": HIDDEN, "reach": LOOK_AHEAD, "segments": PICTURES, "upstream": ALL, **HALF},
    ),
    "overlap, no row sees anything": (replace(DESCRIBED, overlap=True), {"length": 18, "ends": list(range(18))}),
    "own warps, causal": (PARTED, {"length": 50, "heads": (3, 1)}),
    "own warps, window and softcap": (
        PARTED,
        {"length": 53, "ends": HIDDEN, "reach": LOOK_AHEAD, "window": 9, "softcap": 2.0},
    ),
    "every token sees all": (
        SQUARE,
        {"length": 40, "reach": [40] * 40, "dtype": torch.bfloat16, "segments": PICTURES[:40], "upstream": ALL},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_as_accurate_as_pytorch(name: str) -> None:
    tile, arguments = CASES[name]
    with tiles.override(tile):
        check(call(**arguments), "triton")


@pytest.mark.parametrize("upstream", [("output",), ("lse",), ("mass",)])
def test_gradient_through_one_output(upstream: tuple[str, ...]) -> None:
    with tiles.override(SQUARE):
        check(call(20, ends=[20] * 10 + [15] * 5 + [20] * 5, segments=[0] * 16 + [-1, 1, 1, 0], upstream=upstream), "triton")


def test_blocks_out_of_reach_are_not_visited() -> None:
    """A NaN value or gradient there would show: it would be multiplied by a probability of zero."""
    ends, reach = [64] * 32 + [48] * 16 + [64] * 16, [*range(1, 5), *[28] * 24, *range(29, 65)]
    leaves = [torch.randn(1, 1, 64, 16, device=DEVICE) for _ in range(3)]
    trees = [torch.tensor([row], device=DEVICE) for row in (ends, reach)]
    nan_from = torch.where(torch.arange(64, device=DEVICE)[:, None] >= 32, float("nan"), 0.0)

    def run(leaves: list[Tensor], up: Tensor) -> list[Tensor]:
        leaves = [leaf.requires_grad_() for leaf in leaves]
        output = tree_attention(*leaves, trees[0], reach=trees[1], backend="triton").output
        return [output, *torch.autograd.grad(output, leaves, up)]

    up = torch.randn(1, 1, 64, 16, device=DEVICE)
    with tiles.override(SQUARE):
        output, grad_query, *_ = run([leaves[0], leaves[1], leaves[2] + nan_from], up)
        assert output[:, :, 32:].isnan().all() and grad_query[:, :, 32:].isnan().all()
        assert not output[:, :, :32].isnan().any() and not grad_query[:, :, :32].isnan().any()
        # Branch keys see their own branch's queries alone, and prompt keys all.
        _, _, grad_key, grad_value = run(leaves, up.where(torch.arange(64, device=DEVICE)[:, None] < 48, float("nan")))
        for grad in (grad_key, grad_value):
            assert not grad[:, :, 32:48].isnan().any() and grad[:, :, :32].isnan().all()


def test_plan_of_a_picture_over_three_blocks() -> None:
    tree_end, reach = (torch.tensor([LONG[name]]) for name in ("ends", "reach"))
    plans = [
        plan(tree_end, tree_end[:, None, :, None], None, 16, 16, reach) for plan in (tree_plan.query_plan, tree_plan.key_plan)
    ]
    visits = [[(full, sorted(order[:seen])) for full, seen, *order in plan[0].tolist()] for plan in plans]
    # Queries 0 to 15 look as far as key 34; 48 to 63 are the second root's prefix, which ends at 66.
    assert visits[0] == [(0, [0, 1, 2]), (2, [0, 1, 2]), (2, [0, 1, 2]), (1, [3, 4]), (1, [3, 4])]
    assert visits[1] == [(2, [0, 1, 2]), (2, [0, 1, 2]), (0, [0, 1, 2]), (1, [3, 4]), (0, [3, 4])]


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scale_that_is_not_above_zero(scale: float) -> None:
    leaves = [torch.randn(1, 1, 20, 16, device=DEVICE, requires_grad=True) for _ in range(3)]
    with tiles.override(SQUARE):
        outputs = [tree_attention(*leaves, scale=scale, backend=name).output for name in ("triton", "reference")]
        grads = [torch.autograd.grad(output.square().sum(), leaves) for output in outputs]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*grads)


def test_shipped_tiles() -> None:
    """The ones that are chosen here, more than one block of them."""
    check(call(130, heads=(1, 1), ends=[130] * 100 + [110] * 10 + [130] * 20), "triton")


@pytest.mark.parametrize("layout", ["heads first", "sliced", "expanded over the batch"])
def test_any_strides(layout: str) -> None:
    def make(heads: int) -> Tensor:
        if layout == "heads first":
            return torch.randn(2, heads, 18, 16, device=DEVICE)
        if layout == "sliced":
            return torch.randn(2, 20, heads + 1, 24, device=DEVICE)[:, 1:19, 1:, 8:].transpose(1, 2)
        return torch.randn(1, heads, 18, 16, device=DEVICE).expand(2, -1, -1, -1)

    with tiles.override(SQUARE):
        leaves = [make(heads).requires_grad_() for heads in (2, 1, 1)]
        outputs = [tree_attention(*leaves, backend=name).output for name in ("triton", "reference")]
        up = torch.randn_like(outputs[0])[:, :, :, :1].expand_as(outputs[0])
        grads = [torch.autograd.grad(output, leaves, up) for output in outputs]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8)])
def test_nothing_to_attend(shape: tuple[int, ...]) -> None:
    q = torch.zeros(shape, device=DEVICE, requires_grad=True)
    tree_end = torch.zeros(shape[0], shape[2], dtype=torch.int32, device=DEVICE)
    for given in (None, tree_end):
        out = tree_attention(q, q, q, given, window=3, backend="triton")
        out.output.sum().backward()
        assert out.output.shape == shape and out.lse.shape == shape[:3]


def test_same_bits_every_time() -> None:
    one = call(40, segments=PICTURES[:40], heads=(2, 1), dtype=torch.bfloat16)
    found = []
    with tiles.override(SQUARE):
        for _ in range(2):
            leaves = [t.detach().requires_grad_() for t in one.leaves.values()]
            out = tree_attention(*leaves, segments=one.segments, num_segments=3, backend="triton")
            found.append([*out, *torch.autograd.grad(out.output.sum() + out.mass[..., 0].sum(), leaves)])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def test_not_a_number_is_not_hidden() -> None:
    q, k, v = (torch.randn(1, 1, 20, 16, device=DEVICE) for _ in range(3))
    k[0, 0, 3] = float("nan")
    with tiles.override(SQUARE):
        out = tree_attention(q, k, v, backend="triton")
    for found in (out.output, out.lse):
        assert found[0, 0, 3:].isnan().all() and not found[0, 0, :3].isnan().any()


def test_head_dims_that_no_tile_holds() -> None:
    assert backend.unavailable_reason(DEVICE, torch.float32, head_dim=320) == "it takes head dims up to 256, got 320"
    q, v = torch.randn(1, 1, 4, 16, device=DEVICE), torch.randn(1, 1, 4, 320, device=DEVICE)
    with pytest.raises(ValueError, match="it takes head dims up to 256, got 320"):
        tree_attention(q, q, v, backend="triton")


@pytest.mark.parametrize("blocks", [(16, 16), (32, 16), (16, 64)])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", [None, "pictures", "prefix"])
def test_plan_visits_what_is_seen(blocks: tuple[int, int], window: int | None, seed: int, kind: str | None) -> None:
    """Blocks that are seen whole are the ones so marked; a block with nothing to see is visited on the diagonal at most."""
    length = 150
    tree_end, reach = random_tree_end(2, length, seed), None
    if kind is not None:
        tree_end, reach = with_reach(tree_end, seed, kind=kind)
    seen = torch.zeros(2, -(-length // 64) * 64, -(-length // 64) * 64, dtype=torch.bool)
    seen[:, :length, :length] = visible(tree_end, window, reach)
    m, n = blocks
    num_m, num_n = -(-length // m), -(-length // n)
    pairs = seen[:, : num_m * m, : num_n * n].unflatten(2, (num_n, n)).unflatten(1, (num_m, m)).transpose(2, 3)
    some = pairs.any((3, 4))  # (B, M, N)
    inside = torch.arange(num_m * m).view(num_m, m) < length
    every = (pairs | ~inside[:, None, :, None]).all((3, 4))
    for plan, by_key in (
        (tree_plan.query_plan(tree_end, tree_end[:, None, :, None], window, m, n, reach), False),
        (tree_plan.key_plan(tree_end, tree_end[:, None, :, None], window, m, n, reach), True),
    ):
        visited, full = torch.zeros_like(some), torch.zeros_like(some)
        for b, rows in enumerate(plan.tolist()):
            for i, (num_full, num_seen, *order) in enumerate(rows):
                assert sorted(order) == list(range(num_m if by_key else num_n))
                for place, j in enumerate(order[:num_seen]):
                    at = (b, j, i) if by_key else (b, i, j)
                    visited[at], full[at] = True, place < num_full
        assert not (some & ~visited).any()
        last_key, first_query = torch.arange(num_n) * n + n - 1, torch.arange(num_m) * m
        if window is None:
            if reach is None:
                assert not (visited & ~some)[:, last_key <= first_query[:, None]].any()
            assert torch.equal(full, every & inside.all(1)[:, None] if by_key else every)
        else:
            assert not (full & ~every).any()


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("tree", [False, True])
def test_blocks_of_several_segments_count_with_those_that_need_a_mask(tree: bool, window: int | None) -> None:
    """No other block changes its place, and a query visits the same ones."""
    segments = torch.tensor([[-1] * 16 + [0] * 40 + [1] * 8 + [2, -1] * 8 + [3] * 48, [2] * 128])
    tree_end = random_tree_end(2, 128, 3) if tree else None
    like = torch.empty(2, 1, 128, 16)
    plain = tree_plan.query_plan(tree_end, like, window, 16, 16)
    apart = tree_plan.query_plan(tree_end, like, window, 16, 16, None, segments)
    mixed = [[3, 4], []]
    for b in range(2):
        for before, after in zip(plain[b].tolist(), apart[b].tolist(), strict=True):
            full = [block for block in before[2 : 2 + before[0]] if block not in mixed[b]]
            assert after[2 : 2 + after[0]] == full and after[1] == before[1]
            assert sorted(after[2 : 2 + after[1]]) == sorted(before[2 : 2 + before[1]])


def test_plans_of_a_reach_are_kept_and_follow_an_edit() -> None:
    mask = torch.stack([torch.full((1, 40), 40), torch.arange(1, 41)[None]], 1).int()
    plans = [tree_plan.query_plan(mask[:, 0], mask, None, 16, 16, mask[:, 1]) for _ in range(2)]
    assert plans[0] is plans[1] and plans[0][0, 0, :2].tolist() == [0, 1]
    mask[:, 1, :8] = 40
    assert tree_plan.query_plan(mask[:, 0], mask, None, 16, 16, mask[:, 1])[0, 0, :2].tolist() == [0, 3]
    other = torch.full((1, 40), 40, dtype=torch.int32)
    own = tree_plan.query_plan(None, mask, None, 16, 16, other)
    assert own[0, 0, :2].tolist() == [2, 3] and tree_plan.query_plan(None, mask, None, 16, 16, other) is own


def test_plans_are_kept_and_follow_an_edit() -> None:
    tree_end = random_tree_end(1, 40, 0)
    first = tree_plan.query_plan(tree_end.view(1, 40), tree_end, None, 16, 16)
    assert tree_plan.query_plan(tree_end.view(1, 40), tree_end, None, 16, 16) is first
    tree_end[:] = torch.arange(40)
    assert tree_plan.query_plan(tree_end.view(1, 40), tree_end, None, 16, 16)[..., 1].sum() == 0


def test_memory_for_descriptors_is_lent_for_one_launch() -> None:
    """Triton asks the context's allocator; what the caller has set there stays."""
    lent = []

    class Asking:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda **given: lent.append(_allocation._allocator.get()(256, 128, None))

    before = _allocation._allocator.get()
    x = torch.zeros(4, device=DEVICE)
    for descriptors in (True, False):
        launch = Launch(
            kernel=Asking(), programs=1, arguments={"x": x}, constants={}, num_warps=4, num_stages=1, descriptors=descriptors
        )
        if descriptors:
            launch.run()
        else:
            with pytest.raises(RuntimeError, match="allocator"):
                launch.run()
    assert [(each.numel(), each.device) for each in lent] == [(256, x.device)]
    assert _allocation._allocator.get() is before


def test_tiles_of_a_sweep_are_taken_where_they_were_measured_and_serve_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = Tiles(128, 64, 8, 3)
    causal, tree = (next(tile for tile, calls in tiles.CANDIDATES["forward"].items() if len(calls) == many) for many in (1, 2))
    times = {shipped: 3.0, causal: 1.0, tree: 2.0}
    rows = [
        {"pass": "forward", **asdict(tile), "in_table": tile == shipped, "milliseconds": took} for tile, took in times.items()
    ]
    rows.append(
        {"pass": "forward", **asdict(TALL), "in_table": False, "milliseconds": 0.5}
    )  # for no call that is known to compile
    rows.append({"pass": "grad_key", **asdict(causal), "in_table": False, "reason": "out of time"})
    (tmp_path / "tiles.json").write_text(json.dumps({"machine": {"gpu": "NVIDIA H100"}, "rows": rows}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    gpu = torch.device("cuda")
    assert measured_tiles.fastest("causal", gpu) == {}
    monkeypatch.setenv(measured.VARIABLE, str(tmp_path))
    assert measured_tiles.fastest("causal", gpu) == {"forward": causal}
    assert measured_tiles.fastest("tree", gpu) == {"forward": tree}
    assert measured_tiles.fastest("tree mass", gpu) == measured_tiles.fastest("causal", torch.device("cpu")) == {}


def test_smaller_tiles_serve_calls_whose_features_together_would_spill() -> None:
    table = tiles.choose(128, torch.bfloat16, (8, 0))
    both = tiles.choose(128, torch.bfloat16, (8, 0), {"reach", "window"})
    alone = tiles.choose(128, torch.bfloat16, (8, 0), {"reach"})
    assert alone.grad_key == table.grad_key and both.grad_key == Tiles(32, 64, 8, 2)
    assert both.forward == alone.forward != table.forward and both.grad_query == table.grad_query
    softcap = tiles.choose(128, torch.bfloat16, (10, 0), {"softcap"})
    assert tiles.choose(128, torch.bfloat16, (10, 0), {"softcap", "mass"}).forward != softcap.forward
    padded, whole = (tiles.choose(width, torch.bfloat16, (8, 0), {"mass"}) for width in (96, 128))
    assert padded.forward != whole.forward
    known = {*tiles.FEATURES, "light", "heavy", "padded"}
    assert all(tight.when <= known and tight.tiles for tight in tiles._TIGHT)


@pytest.mark.parametrize(("family", "capability"), [("ampere", (8, 0)), ("hopper", (9, 0)), ("blackwell", (10, 0))])
def test_every_set_of_features_is_compiled_ahead_of_time_and_every_smaller_tile(family: str, capability: tuple[int, int]) -> None:
    shipped = {label: features for label, _, dim, features in backend._shipped() if label.startswith(f"bf16 {dim} tree")}
    for dim in (64, 96, 128, 256):
        of_dim = {tuple(features.items()) for label, features in shipped.items() if label.split()[1] == str(dim)}
        assert len(of_dim) == 2 ** len(tiles.FEATURES)
    used = {
        (launch.constants["BLOCK_M"], launch.constants["BLOCK_N"], launch.num_warps)
        for label, features in shipped.items()
        for launch in backend._example(torch.bfloat16, int(label.split()[1]), capability, **features)
        if "BLOCK_N" in launch.constants
    }
    smaller = [each for tight in tiles._TIGHT if tight.family == family for each in tight.tiles.values()]
    assert smaller and all((each.block_m, each.block_n, each.num_warps) in used for each in smaller)


def test_tensors_of_other_alignment_than_the_sweep_s_take_the_table_s_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found without spills reads 16 bytes at a time."""
    found = Tiles(64, 32, 8, 2)
    monkeypatch.setattr(
        measured_tiles, "fastest", lambda kind, device: dict.fromkeys(("forward", "grad_key", "grad_query"), found)
    )
    whole = torch.zeros(1, 20, 2, 128, dtype=torch.bfloat16).transpose(1, 2)
    strided = torch.zeros(1, 20, 2, 132, dtype=torch.bfloat16)[..., :128].transpose(1, 2)
    shifted = torch.zeros(20 * 2 * 128 + 1, dtype=torch.bfloat16)[1:].view(1, 20, 2, 128).transpose(1, 2)
    call = TreeAttentionCall(None, None, 0, 1.0, softcap=None, window=None)

    def chosen(query: Tensor, value: Tensor, upstream: Tensor | None = None) -> list[Tiles]:
        several = backend._Launches(query, whole, value, call, (9, 0))._tiles(upstream)
        return [several.forward, several.grad_key, several.grad_query]

    table = tiles.choose(128, torch.bfloat16, (9, 0))
    assert chosen(whole, whole) == chosen(whole, whole, whole) == [found] * 3
    for given in ((strided, whole), (whole, shifted), (whole, whole, strided)):
        assert chosen(*given) == [table.forward, table.grad_key, table.grad_query]


def test_the_kind_of_a_call_decides_whether_a_sweep_s_tiles_may_serve_it() -> None:
    def kind(
        capability: tuple[int, int] = (9, 0), dtype: torch.dtype = torch.bfloat16, dim: int = 128, **given: Any
    ) -> str | None:
        query = torch.empty(1, 4, 8, dim, dtype=dtype, device="meta")
        ids = torch.empty(1, 8, dtype=torch.int32, device="meta")
        fields = {"tree_end": ids if given.pop("tree", True) else None, "segments": None, "num_segments": 0, "scale": 1.0}
        call = TreeAttentionCall(**{**fields, "softcap": None, "window": None, "reach": None, **given})
        return backend._Launches(query, query, query, call)._kind(capability)

    assert [kind(tree=False), kind(), kind(num_segments=2)] == ["causal", "tree", "tree mass"]
    reach = torch.empty(1, 8, dtype=torch.int32, device="meta")
    unserved = [{"window": 4}, {"softcap": 2.0}, {"reach": reach}, {"dtype": torch.float32}, {"dim": 96}, {"capability": (8, 0)}]
    assert [kind(**each) for each in unserved] == [None] * 6
