"""The C++ `tree_attention` against the reference, at every SIMD level it has on this CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from trees import assert_accurate, random_tree_end, with_reach

from mmdpo_kernels import backends, tree_attention
from mmdpo_kernels.backends.calls import TreeAttentionCall
from mmdpo_kernels.backends.native import extension
from mmdpo_kernels.backends.native import tree_attention as native

MODULE = extension.load()
LEVELS = [] if isinstance(MODULE, str) else MODULE.supported_cpu_levels()
REASON = native.unavailable_reason("cpu", torch.float32)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

# One token; an odd length with grouped heads; whole blocks of 96; one row more, a head dim that is no whole tile; several blocks.
SHAPES = [(1, 1, 1, 1, 8), (3, 4, 2, 67, 24), (1, 2, 2, 192, 64), (2, 4, 1, 97, 80), (1, 2, 2, 301, 16)]
# Levels that make products of bfloat16, the last on any CPU.
PAIRED = [*(level for level in LEVELS if level == "amx"), "amx_emulated"]
HALF = [(level, torch.bfloat16, shape) for level in [*LEVELS[1:], "amx_emulated"] for shape in SHAPES]
HALF += [(level, torch.float16, shape) for level in LEVELS[-1:] for shape in SHAPES[1:4]]


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    batch, heads, kv, length, dim = shape
    return tuple(torch.randn(batch, length, h, dim).transpose(1, 2).requires_grad_() for h in (heads, kv, kv))  # type: ignore[return-value]


def run(
    qkv: tuple[Tensor, ...], tree_end: Tensor | None, up: Tensor, dtype: torch.dtype, backend: str, reach: Tensor | None = None
) -> list[Tensor]:
    """Output, lse, gradients."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in qkv]
    out = tree_attention(*leaves, tree_end, reach=reach, backend=backend)
    return [out.output.detach(), out.lse.detach(), *torch.autograd.grad(out.output, leaves, up.to(dtype))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_as_accurate_as_pytorch(shape: tuple[int, ...], seed: int | None) -> None:
    qkv = inputs(shape)
    tree_end = None if seed is None else random_tree_end(shape[0], shape[3], seed)
    check_beside_flash(qkv, tree_end, None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["pictures", "prefix"])
def test_reach_as_accurate_as_pytorch(shape: tuple[int, ...], kind: str) -> None:
    """Pictures across blocks; the whole root of a tree, and of one sequence."""
    tree_end, reach = with_reach(random_tree_end(shape[0], shape[3], 3), 0, kind=kind)
    check_beside_flash(inputs(shape), tree_end, reach)
    whole, reach = with_reach(torch.full_like(tree_end, shape[3]), 1, kind=kind)
    check_beside_flash(inputs(shape), None, reach)


def check_beside_flash(qkv: tuple[Tensor, ...], tree_end: Tensor | None, reach: Tensor | None) -> None:
    up = torch.randn(qkv[0].shape)
    ours, flash = (run(qkv, tree_end, up, torch.float32, name, reach) for name in ("native", "sdpa"))
    truth = run(qkv, tree_end, up, torch.float64, "reference", reach)
    assert torch.equal(ours[1].isinf(), truth[1].isinf())
    for mine, theirs, exact in zip(ours, flash, truth, strict=True):
        # Of the largest entry, since all are sums of terms of that size; a gradient's terms may cancel, and are of the size of `up`.
        kept = exact.isfinite()
        step = 4 * torch.finfo(torch.float32).eps * max(1.0, float(exact[kept].abs().max()))
        assert (mine - exact)[kept].abs().max() <= 1.5 * (theirs - exact)[kept].abs().max() + step


@pytest.mark.parametrize(("level", "dtype", "shape"), HALF)
@pytest.mark.parametrize("ahead", [False, True])
def test_half_precision_keeps_the_accuracy_rule(
    level: str, dtype: torch.dtype, shape: tuple[int, ...], ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMDPO_CPU_LEVEL", level)
    qkv = [t.detach().to(dtype) for t in inputs(shape)]
    tree_end, reach = random_tree_end(shape[0], shape[3], 1), None
    if ahead:
        tree_end, reach = with_reach(tree_end, 2, kind="pictures")
    up = torch.randn(qkv[0].shape).to(dtype)
    ours, plain, truth = (
        run(tuple(qkv), tree_end, up, *how, reach)
        for how in ((dtype, "native"), (dtype, "reference"), (torch.float64, "reference"))
    )
    assert [t.dtype for t in ours] == [dtype, torch.float32, dtype, dtype, dtype]
    for mine, theirs, exact in zip(ours, plain, truth, strict=True):
        kept = exact.isfinite()
        assert_accurate(mine[kept], theirs[kept], exact[kept])


@pytest.mark.parametrize("level", [*LEVELS[1:], "amx_emulated"])
@pytest.mark.parametrize("large", [False, True])
def test_where_bfloat16_is_multiplied_as_such(level: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At levels with such products, which round probabilities, and where they carry the numbers. Elsewhere it is only another way to write
    float32: results differ by no bit before they are rounded."""
    monkeypatch.setenv("MMDPO_CPU_LEVEL", level)
    q, k, v, up = (t.detach().bfloat16() for t in (*inputs((1, 4, 2, 130, 24)), torch.randn(1, 4, 130, 24)))
    if large:
        # Beside numbers as large, those count that the matrix units take for zeros.
        q[..., 0], k[..., 0] = 2.0**-127, 2.0**100
    call = TreeAttentionCall(random_tree_end(1, 130, 1), None, 0, 0.2, None, None)
    output, lse, _ = native.forward(q, k, v, call)
    wide, wide_lse, _ = native.forward(q.float(), k.float(), v.float(), call)
    grads = native.backward(up, None, None, q, k, v, output, lse, call)
    wide_grads = native.backward(up.float(), None, None, q.float(), k.float(), v.float(), output.float(), lse, call)
    same = [torch.equal(one, other.to(one.dtype)) for one, other in zip((output, *grads), (wide, *wide_grads), strict=True)]
    assert same == [large or level not in PAIRED] * 4
    torch.testing.assert_close(lse, wide_lse, rtol=1e-5, atol=1e-5)


def test_is_what_auto_takes() -> None:
    q, k, v = inputs((1, 2, 2, 100, 16))
    assert backends()["tree_attention"]["native"] is None or torch.cuda.is_available()
    assert torch.equal(tree_attention(q, k, v).output, tree_attention(q, k, v, backend="native").output)
    assert native.unavailable_reason("cpu", torch.float64) == "it takes float32, bfloat16 and float16, got torch.float64"
    with pytest.raises(ValueError, match="it has no sliding windows"):
        tree_attention(q, k, v, window=3, backend="native")


@pytest.mark.parametrize(("ahead", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)])
def test_result_does_not_depend_on_threads(ahead: bool, dtype: torch.dtype) -> None:
    qkv = inputs((1, 3, 3, 500, 32))
    tree_end, reach = random_tree_end(1, 500, 4), None
    if ahead:
        tree_end, reach = with_reach(tree_end, 2, kind="pictures")
    up = torch.randn(qkv[0].shape)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 5):
            torch.set_num_threads(count)
            found.append(run(qkv, tree_end, up, dtype, "native", reach))
    finally:
        torch.set_num_threads(threads)
    for one, five in zip(*found, strict=True):
        assert torch.equal(one, five)


def test_reach_of_each_query_itself_is_no_reach() -> None:
    qkv = inputs((1, 3, 3, 500, 32))
    tree_end = random_tree_end(1, 500, 4, padding=False)
    reach = torch.arange(1, 501, dtype=torch.int32)[None]
    up = torch.randn(qkv[0].shape)
    for one, other in zip(*(run(qkv, tree_end, up, torch.float32, "native", r) for r in (None, reach)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("how", ["contiguous heads", "sliced", "expanded gradient"])
def test_any_strides(how: str) -> None:
    q, k, v = (t.detach() for t in inputs((2, 2, 2, 50, 16)))
    if how == "contiguous heads":
        q, k, v = (t.contiguous() for t in (q, k, v))
    elif how == "sliced":
        q, k, v = (torch.cat([t, t], dim=3)[:, :, :, :16] for t in (q, k, v))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    grads = []
    for name in ("native", "reference"):
        output = tree_attention(*leaves, backend=name).output
        up = (
            torch.ones(()).expand(output.shape)
            if how == "expanded gradient"
            else torch.linspace(-1, 1, output.numel()).view(output.shape)
        )
        grads.append(torch.autograd.grad(output, leaves, up))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_so_and_where_it_is(bad: float, dtype: torch.dtype) -> None:
    """A bad key spoils the rows that see it, and no other."""
    q, k, v = (t.detach().to(dtype, copy=True) for t in inputs((1, 1, 1, 200, 8)))
    k[0, 0, 120] = bad
    tree_end = torch.full((1, 200), 200, dtype=torch.int32)
    tree_end[0, 110:150] = 150
    ours, truth = (tree_attention(q, k, v, tree_end, backend=name).output for name in ("native", "reference"))
    assert torch.equal(ours.isnan(), truth.isnan())
    assert truth.isnan().any() and not truth[0, 0, 150:].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_see_nothing(dtype: torch.dtype) -> None:
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in inputs((1, 1, 1, 130, 8)))
    tree_end = torch.full((1, 130), 130, dtype=torch.int32)
    tree_end[0, :100] = torch.arange(100)
    out = tree_attention(q, k, v, tree_end, backend="native")
    assert (out.output[:, :, :100] == 0).all() and (out.lse[:, :, :100] == float("-inf")).all()
    grads = torch.autograd.grad(out.output.sum(), (q, k, v))
    assert all(bool((grad[:, :, :100] == 0).all()) and bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize("with_output", [True, False])
def test_gradient_through_lse(with_output: bool) -> None:
    q, k, v = inputs((1, 2, 1, 140, 8))
    tree_end = random_tree_end(1, 140, 3, padding=False)
    grads = []
    for name in ("native", "reference"):
        out = tree_attention(q, k, v, tree_end, backend=name)
        grads.append(torch.autograd.grad(out.lse.sin().sum() + (out.output.sum() if with_output else 0.0), (q, k)))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_levels(level: str) -> None:
    """Every instruction set in a process of its own; the lowest is refused with a reason."""
    program = (
        "import torch; from mmdpo_kernels import tree_attention; torch.manual_seed(0)\n"
        "q = torch.randn(1, 2, 300, 40, requires_grad=True)\n"
        "ends = torch.full((1, 300), 300, dtype=torch.int32); ends[0, 100:200] = 200\n"
        "reach = torch.arange(1, 301)[None].clone(); reach[0, 110:150] = 150\n"
        "out = [tree_attention(q, q, q, ends, reach=reach, backend=name).output for name in ('native', 'reference')]\n"
        "torch.testing.assert_close(*out, rtol=1e-4, atol=1e-5)\n"
        "torch.testing.assert_close(*[torch.autograd.grad(o.sin().sum(), q)[0] for o in out], rtol=1e-4, atol=1e-5)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "MMDPO_CPU_LEVEL": level}, capture_output=True, text=True, check=False
    )
    if level == "generic":
        assert "needs a CPU with AVX2" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
