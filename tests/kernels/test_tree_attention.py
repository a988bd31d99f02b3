"""tree_attention: every backend against dense float64, gradients, masks, errors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor
from trees import LOOKING_AHEAD, assert_accurate, random_tree_end, with_reach

from mmdpo_kernels import tree_attention
from mmdpo_kernels.backends.sdpa import flash
from mmdpo_kernels.tree_mask import PlanCache, depth, rectangles, visible


def dense(query: Tensor, key: Tensor, value: Tensor, tree_end: Tensor, segments: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The specification, written independently: a Python loop over the rule."""
    batch, heads, length, dim = query.shape
    seen = torch.tensor([[[j <= i < e for j, e in enumerate(row)] for i in range(length)] for row in tree_end.tolist()])
    key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    scores = (query @ key.mT / dim**0.5).masked_fill(~seen[:, None], float("-inf"))
    p = scores.softmax(-1).nan_to_num(0.0)
    one_hot = torch.nn.functional.one_hot(segments.long() + 1, n + 1)[..., 1:].to(p.dtype)
    return p @ value, scores.logsumexp(-1), p @ one_hot[:, None]


def inputs(batch: int, heads: int, kv: int, length: int, dim: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    make = [torch.randn(batch, length, h, dim, dtype=dtype).transpose(1, 2) for h in (heads, kv, kv)]
    return [t.requires_grad_() for t in make]


# One token, an odd length, more than one 32-wide block of the CPU kernel with grouped heads.
SHAPES = [(1, 1, 1, 1, 8), (2, 2, 1, 7, 16), (3, 4, 2, 67, 24)]


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_forward_and_backward_equal_the_rule(backend: str, shape: tuple[int, ...], seed: int) -> None:
    q, k, v = inputs(*shape)
    tree_end = random_tree_end(shape[0], shape[3], seed)
    n = 3 if backend == "reference" else 0
    segments = torch.randint(-1, 3, tree_end.shape) if n else torch.full(tree_end.shape, -1)
    got = tree_attention(q, k, v, tree_end, segments=segments, num_segments=n, backend=backend)
    want = dense(q, k, v, tree_end, segments, n)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    rows = (got.lse.isfinite()).to(q.dtype)[..., None]
    up = torch.randn_like(want[0]) * rows
    parts = [(got.output * up).sum(), (want[0] * up).sum()]
    if n:
        finite = got.lse.isfinite()
        parts[0] = parts[0] + got.lse[finite].sin().sum() + (got.mass**2).sum()
        parts[1] = parts[1] + want[1][finite].sin().sum() + (want[2] ** 2).sum()
    mine = torch.autograd.grad(parts[0], (q, k, v))
    truth = torch.autograd.grad(parts[1], (q, k, v))
    for a, b in zip(mine, truth, strict=True):
        torch.testing.assert_close(a, b.nan_to_num(0.0), rtol=1e-9, atol=1e-11)


REACH = torch.tensor([[2, 2, 4, 4, 5], [3, 3, 3, 4, 5]], dtype=torch.int32)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": 3}, {"scale": 0.3}, {"reach": REACH, "window": 2}])
def test_reference_gradcheck(options: dict[str, Any]) -> None:
    q, k, v = inputs(2, 2, 1, 5, 4)
    tree_end = torch.tensor([[5, 5, 4, 4, 5], [2, 2, 0 if "reach" in options else 2, 5, 0]], dtype=torch.int32)
    segments = torch.tensor([[0, 1, -1, 0, 1], [1, 1, 0, -1, -1]])

    def run(*qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = tree_attention(*qkv, tree_end, segments=segments, num_segments=2, backend="reference", **options)
        return out.output, out.lse.masked_fill(out.lse == float("-inf"), 0.0), out.mass

    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize("which", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_of_subsets(which: tuple[bool, bool, bool]) -> None:
    leaves = [t.detach().requires_grad_(want) for t, want in zip(inputs(1, 2, 2, 9, 8), which, strict=True)]
    tree_end = random_tree_end(1, 9, 1, padding=False)
    grads = {}
    for backend in ("reference", "sdpa"):
        (grads[backend],) = torch.autograd.grad(
            tree_attention(*leaves, tree_end, backend=backend).output.sum(), [t for t in leaves if t.requires_grad]
        )
    torch.testing.assert_close(grads["sdpa"], grads["reference"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_keeps_the_accuracy_rule(dtype: torch.dtype) -> None:
    q, k, v = (t.detach().to(dtype) for t in inputs(2, 4, 2, 67, 24))
    tree_end = random_tree_end(2, 67, 3, padding=False)
    none = torch.full(tree_end.shape, -1)
    truth = dense(q.double(), k.double(), v.double(), tree_end, none, 0)[0]
    plain = dense(q, k, v, tree_end, none, 0)[0]
    ours = tree_attention(q, k, v, tree_end, backend="sdpa").output
    assert_accurate(ours, plain, truth)


def test_padding_rows_are_zero() -> None:
    q, k, v = (t.detach() for t in inputs(1, 1, 1, 6, 8))
    tree_end = torch.tensor([[0, 1, 6, 6, 6, 6]], dtype=torch.int32)
    for backend in ("reference", "sdpa"):
        out = tree_attention(q, k, v, tree_end, backend=backend)
        assert (out.output[:, :, :2] == 0).all()
        assert (out.lse[:, :, :2] == float("-inf")).all()


@pytest.mark.parametrize("seed", range(20))
def test_rectangles_cover_the_rule_exactly_once(seed: int) -> None:
    tree_end = random_tree_end(3, 23, seed)
    count = torch.zeros(3, 23, 23, dtype=torch.int64)
    for plan in rectangles(tree_end):
        for r in plan.rectangles:
            block = torch.ones(r.q1 - r.q0, r.k1 - r.k0, dtype=torch.int64)
            count[plan.b0 : plan.b1, r.q0 : r.q1, r.k0 : r.k1] += block.tril() if r.causal else block
    assert torch.equal(count, visible(tree_end).long())


@pytest.mark.parametrize("kind", LOOKING_AHEAD)
@pytest.mark.parametrize("seed", range(10))
def test_rectangles_with_reach_cover_the_rule_exactly_once(seed: int, kind: str) -> None:
    tree_end = random_tree_end(3, 23, seed)
    tree_end[:, 5:9:2] = 0
    tree_end, reach = with_reach(tree_end, seed, kind=kind)
    for ends in (tree_end, None):
        count = torch.zeros(3, 23, 23, dtype=torch.int64)
        for plan in rectangles(ends, reach):
            for r in plan.rectangles:
                block = torch.ones(r.q1 - r.q0, r.k1 - r.k0, dtype=torch.int64)
                count[plan.b0 : plan.b1, r.q0 : r.q1, r.k0 : r.k1] += block.tril() if r.causal else block
        assert torch.equal(count, visible(torch.full_like(tree_end, 23) if ends is None else ends, reach=reach).long())


def test_a_picture_is_one_full_rectangle() -> None:
    """With what is before it; the text after it sees both in another."""
    reach = torch.tensor([[1, 2, 6, 6, 6, 6, 7, 8]], dtype=torch.int32)
    (plan,) = rectangles(None, reach)
    assert [tuple(rectangle) for rectangle in plan.rectangles] == [
        (0, 2, 0, 2, True),
        (2, 6, 0, 6, False),
        (6, 8, 0, 6, False),
        (6, 8, 6, 8, True),
    ]


def test_plan_follows_an_edit_of_reach() -> None:
    tree_end = torch.tensor([[4, 4, 4, 4]], dtype=torch.int32)
    reach = torch.tensor([[1, 2, 3, 4]], dtype=torch.int32)
    before = rectangles(tree_end, reach)
    assert rectangles(tree_end[:, :], reach) is before
    reach[0, 1] = 3
    assert rectangles(tree_end, reach) != before


def test_depth_leaves_siblings_out() -> None:
    # A prompt of 3, a branch of 2, a branch of 3; then a left-padded row.
    tree_end = torch.tensor([[8, 8, 8, 5, 5, 8, 8, 8], [0, 1, 8, 8, 8, 8, 8, 8]], dtype=torch.int32)
    assert depth(tree_end)[0].tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert depth(tree_end)[1, 2:].tolist() == [0, 1, 2, 3, 4, 5]


def test_plan_follows_an_edit_of_the_tensor() -> None:
    tree_end = torch.tensor([[4, 4, 4, 4]], dtype=torch.int32)
    before = rectangles(tree_end)
    tree_end[0, 2:] = torch.tensor([3, 4])
    assert rectangles(tree_end) != before


def test_plans_of_views_do_not_pile_up() -> None:
    """One tensor may hold the trees of a whole data set; what a forward asks for again is there."""

    class Plan:
        pass

    alive: WeakSet[Plan] = WeakSet()

    def make(tensor: Tensor, window: int) -> Plan:
        plan = Plan()
        alive.add(plan)
        return plan

    cache = PlanCache(make)
    whole = torch.zeros(200, 4, dtype=torch.int32)
    for row in whole.split(1):
        plans = [cache(row, window) for window in (1, 2)]
        assert [cache(row, window) for window in (1, 2)] == plans
    assert len(alive) == PlanCache.MOST < 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tree_end": torch.zeros(1, 3, dtype=torch.int32)}, "tree_end must have shape"),
        ({"backend": "cuda"}, "backend must be 'auto' or one of"),
        ({"backend": "sdpa", "softcap": 1.0}, "no softcap"),
        ({"num_segments": 2}, "needs segments"),
        ({"segments": torch.full((1, 4), 5), "num_segments": 2}, r"segments must be in \[-1, 2\), got 5"),
        ({"window": 0}, "window must be above 0"),
        ({"reach": torch.ones(4, dtype=torch.int32)}, r"reach must have shape \(1, 4\), got \(4,\)"),
        ({"reach": torch.tensor([[1, 2, 2, 4]])}, r"reach\[0, 2\] must be in \[3, 4\], got 2"),
        ({"reach": torch.tensor([[1, 2, 5, 4]])}, r"reach\[0, 2\] must be in \[3, 4\], got 5"),
        (
            {"tree_end": torch.tensor([[4, 4, 2, 4]]), "reach": torch.tensor([[4, 4, 4, 4]])},
            r"with reach, a hidden key's tree_end must be 0, got tree_end\[0, 2\] = 2",
        ),
        pytest.param({"backend": "varlen", "reach": torch.tensor([[1, 2, 3, 4]])}, "flash attention has no reach", id="varlen"),
    ],
)
def test_errors_name_the_argument(change: dict[str, object], message: str) -> None:
    q, k, v = (t.detach() for t in inputs(1, 2, 1, 4, 8))
    with pytest.raises(ValueError, match=message):
        tree_attention(q, k, v, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e3, 2e4])
def test_sdpa_gives_the_gradient_through_lse(dtype: torch.dtype, size: float) -> None:
    """Of any size beside the gradient of the output, in a dtype that could not hold it, as it comes with a loss scale."""
    qkv = [t.detach().to(dtype) for t in inputs(1, 4, 2, 40, 16)]
    tree_end = random_tree_end(1, 40, 2)
    torch.manual_seed(0)
    through_output, through_lse = torch.randn(1, 4, 40, 16).to(dtype), torch.randn(1, 4, 40, dtype=torch.float64) * size

    def grads(backend: str, wide: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(wide).requires_grad_() for t in qkv]
        out = tree_attention(*leaves, tree_end, backend=backend)
        return torch.autograd.grad((out.output, out.lse), leaves, (through_output.to(wide), through_lse.to(out.lse.dtype)))

    for ours, plain, truth in zip(
        grads("sdpa", dtype), grads("reference", dtype), grads("reference", torch.float64), strict=True
    ):
        # Four steps, since a row's terms cancel.
        allowed = 2 * (plain - truth).abs().max() + 4 * torch.finfo(dtype).eps * truth.abs().max()
        assert truth.abs().max() < torch.finfo(torch.float16).max
        assert (ours - truth).abs().max() <= allowed


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("with_tree", [True, False])
def test_any_strides(which: int, how: str, with_tree: bool) -> None:
    tensors = [torch.randn(2, 4, 9, 8) for _ in range(3)]
    odd = {
        "transposed": lambda: torch.randn(2, 4, 8, 9).transpose(2, 3),
        "sliced": lambda: torch.randn(2, 4, 9, 16)[..., ::2],
        "expanded": lambda: torch.randn(2, 4, 9, 1).expand(-1, -1, -1, 8),
    }[how]()
    tensors[which] = odd.requires_grad_() if odd.is_leaf else odd.detach().requires_grad_()
    tree_end = random_tree_end(2, 9, 5, padding=False) if with_tree else None
    outputs = [tree_attention(*tensors, tree_end, backend=name).output for name in ("sdpa", "reference")]
    torch.testing.assert_close(*outputs)
    grads = [torch.autograd.grad(output.sum(), tensors[which])[0] for output in outputs]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8)])
@pytest.mark.parametrize("with_tree", [True, False])
def test_nothing_to_attend(shape: tuple[int, ...], with_tree: bool) -> None:
    q = torch.zeros(shape, requires_grad=True)
    tree_end = torch.zeros(shape[0], shape[2], dtype=torch.int32) if with_tree else None
    for backend in ("sdpa", "reference"):
        output = tree_attention(q, q, q, tree_end, backend=backend).output
        output.sum().backward()
        assert output.shape == shape


def test_automatic_choice_keeps_the_gradient_through_lse() -> None:
    q, k, v = inputs(1, 2, 1, 5, 8)
    grads = []
    for backend in ("auto", "reference"):
        out = tree_attention(q, k, v, backend=backend)
        grads.append(torch.autograd.grad(out.lse.sum() + out.output.sum(), (q, k, v)))
    torch.testing.assert_close(*grads)


def test_reach_must_be_integer() -> None:
    q, k, v = (t.detach() for t in inputs(1, 2, 1, 4, 8))
    with pytest.raises(TypeError, match=r"reach must be an integer tensor, got torch.float32"):
        tree_attention(q, k, v, reach=torch.ones(1, 4))


def test_a_hidden_query_may_have_any_reach() -> None:
    """What it sees is nobody's business; the largest reach there is stays within the keys."""
    q, k, v = inputs(1, 2, 1, 5, 8)
    tree_end, reach = torch.tensor([[5, 5, 0, 5, 0]]), torch.tensor([[2, 2, 99, 5, 0]])
    found = []
    for backend in ("reference", "sdpa"):
        out = tree_attention(q, k, v, tree_end, reach=reach, backend=backend)
        found.append((out.output, *torch.autograd.grad(out.output.sum(), (q, k, v))))
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours, truth)
    assert (found[0][0][:, :, 4] == 0).all()


@pytest.mark.parametrize("name", ["tree_end", "reach", "segments"])
def test_a_list_is_no_tensor(name: str) -> None:
    query = torch.randn(1, 2, 4, 8)
    with pytest.raises(TypeError, match=rf"{name} must be a tensor of shape \(1, 4\), got list"):
        tree_attention(query, query, query, **{name: [[4, 4, 4, 4]]})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["value", "tree_end", "reach", "segments"])
def test_a_tensor_on_another_device_is_refused(name: str) -> None:
    query, tree_end = torch.randn(1, 2, 4, 8), torch.full((1, 4), 4, dtype=torch.int32)
    given = {"value": query, "tree_end": tree_end, "segments": torch.zeros(1, 4, dtype=torch.int32), "reach": tree_end}
    given[name] = given[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} must be on the query's device cpu, got meta"):
        tree_attention(
            query, query, given["value"], given["tree_end"], reach=given["reach"], segments=given["segments"], num_segments=1
        )


def test_a_gpu_s_flash_attention_is_given_an_lse_without_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel follows the address alone. The call fits the operators' schemas: meta tensors get results of the right shapes."""
    query = torch.empty(2, 4, 9, 16, dtype=torch.bfloat16, device="meta")
    key = torch.empty(2, 2, 12, 16, dtype=torch.bfloat16, device="meta")
    output, lse = flash.forward(query, key, key, False, 0.25)
    assert output.shape == query.shape and lse.shape == (2, 4, 9) and lse.dtype == torch.float32
    operator, seen = torch.ops.aten._scaled_dot_product_flash_attention_backward, []

    def watched(*arguments: Tensor, **options: float) -> tuple[Tensor, ...]:
        seen.append(arguments[5])
        return operator(*arguments, **options)

    monkeypatch.setattr(flash, "_aten", SimpleNamespace(_scaled_dot_product_flash_attention_backward=watched))
    rows = torch.empty(2, 4, 20, device="meta")[:, :, 5:14]
    grads = flash.backward(output, query, key, key, output, rows, False, 0.25)
    assert [grad.shape for grad in grads] == [query.shape, key.shape, key.shape]
    assert seen[0].is_contiguous()
