"""`tree_attention` in Triton: on the GPU where there is one, else interpreted. Small tiles bring calls of few tokens to many blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import DEVICE
from property_cases import Call, check
from torch import Tensor
from trees import random_tree_end

from mmdpo_kernels import tree_attention
from mmdpo_kernels.backends.triton import tree_attention as backend
from mmdpo_kernels.backends.triton import tree_attention_tiles as tiles
from mmdpo_kernels.backends.triton import tree_plan
from mmdpo_kernels.backends.triton.tree_attention_tiles import Tiles
from mmdpo_kernels.tree_mask import visible

SQUARE, TALL, WIDE = (Tiles(m, n, 4, 2) for m, n in ((16, 16), (32, 16), (16, 32)))

# A prompt of one block, a branch of one that the next branch must skip, a branch that ends inside a block, padding.
BRANCHES = [50] * 16 + [32] * 16 + [50] * 18 + [50, 51, 52]
# None, one segment for a whole block, then two in turn: every kind of key block.
PICTURES = [-1] * 16 + [0] * 20 + [1, 2] * 8 + [-1]


def call(
    length: int,
    dims: tuple[int, int] = (16, 16),
    heads: tuple[int, int] = (2, 1),
    dtype: torch.dtype = torch.float32,
    ends: list[int] | None = None,
    segments: list[int] | None = None,
    upstream: tuple[str, ...] = ("output", "lse"),
    **options: Any,
) -> Call:
    """Heads last but one in memory, as models have them."""
    shapes = {"query": (heads[0], dims[0]), "key": (heads[1], dims[0]), "value": (heads[1], dims[1])}
    leaves = {name: torch.randn(1, length, h, dim).transpose(1, 2).to(DEVICE, dtype) for name, (h, dim) in shapes.items()}
    row = {name: None if v is None else torch.tensor([v], device=DEVICE) for name, v in (("ends", ends), ("segments", segments))}
    return Call(
        leaves=leaves,
        tree_end=row["ends"],
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
def test_plan_visits_what_is_seen(blocks: tuple[int, int], window: int | None, seed: int) -> None:
    """Blocks that are seen whole are the ones so marked; a block with nothing to see is visited on the diagonal at most."""
    length = 150
    tree_end = random_tree_end(2, length, seed)
    seen = torch.zeros(2, -(-length // 64) * 64, -(-length // 64) * 64, dtype=torch.bool)
    seen[:, :length, :length] = visible(tree_end, window)
    m, n = blocks
    num_m, num_n = -(-length // m), -(-length // n)
    pairs = seen[:, : num_m * m, : num_n * n].unflatten(2, (num_n, n)).unflatten(1, (num_m, m)).transpose(2, 3)
    some = pairs.any((3, 4))  # (B, M, N)
    inside = torch.arange(num_m * m).view(num_m, m) < length
    every = (pairs | ~inside[:, None, :, None]).all((3, 4))
    for plan, by_key in (
        (tree_plan.query_plan(tree_end, tree_end[:, None, :, None], window, m, n), False),
        (tree_plan.key_plan(tree_end, tree_end[:, None, :, None], window, m, n), True),
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
            assert not (visited & ~some)[:, last_key <= first_query[:, None]].any()
            assert torch.equal(full, every & inside.all(1)[:, None] if by_key else every)
        else:
            assert not (full & ~every).any()


def test_plans_are_kept_and_follow_an_edit() -> None:
    tree_end = random_tree_end(1, 40, 0)
    first = tree_plan.query_plan(tree_end.view(1, 40), tree_end, None, 16, 16)
    assert tree_plan.query_plan(tree_end.view(1, 40), tree_end, None, 16, 16) is first
    tree_end[:] = torch.arange(40)
    assert tree_plan.query_plan(tree_end.view(1, 40), tree_end, None, 16, 16)[..., 1].sum() == 0
