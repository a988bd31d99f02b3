"""The C++ `attention_mass` against the reference, at every SIMD level this CPU has."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from mass_cases import REDUCTIONS, Sizes, assert_as_accurate, assert_sums_as_accurate, make_call
from torch import Tensor

from mmdpo_kernels import attention_mass, backends
from mmdpo_kernels.backends.calls import AttentionMassCall
from mmdpo_kernels.backends.native import attention_mass as native
from mmdpo_kernels.backends.native import extension
from mmdpo_kernels.backends.reference import attention_mass as reference

MODULE = extension.load()
LEVELS = [] if isinstance(MODULE, str) else MODULE.supported_cpu_levels()
# Levels that differ from the one below in products of bfloat16 only, the last on any CPU.
PAIRED = [*(level for level in LEVELS if level == "amx"), "amx_emulated"]
CASES = [(level, dtype) for level in LEVELS if level not in PAIRED for dtype in (torch.float32, torch.bfloat16, torch.float16)]
CASES += [(level, torch.bfloat16) for level in PAIRED]
OWN_CASES = [(level, dtype) for level, dtype in CASES if dtype == (torch.bfloat16 if level in PAIRED else torch.float32)]
OPTIONS = {"plain": {}, "softcap": {"softcap": 5.0}, "window": {"window": 20}}


SIZES = {
    "one": Sizes(1, 1, 1, 1, 1, 1),
    "odd": Sizes(2, 6, 2, 5, 67, 24),  # a last key block of 19, a strip that is not full
    "edge": Sizes(1, 8, 1, 12, 96, 64),  # whole key blocks and whole strips, one key head
    "deep": Sizes(1, 4, 2, 9, 300, 80),  # D is no multiple of the dot product's chunk
}


def test_the_extension_is_built() -> None:
    assert not isinstance(MODULE, str), MODULE
    assert LEVELS[0] == "generic"
    assert backends()["attention_mass"]["native"] is None or torch.cuda.is_available()


@pytest.mark.parametrize(("level", "dtype"), CASES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("lse", [False, True])
def test_as_accurate_as_pytorch(level: str, option: str, lse: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMDPO_CPU_LEVEL", level)
    for sizes in SIZES.values():
        for tree in (False, True):
            call = make_call(sizes, dtype, OPTIONS[option], tree, lse)
            largest = call.largest_score()
            for reduce in REDUCTIONS:
                truth = call.run(reference, reduce, torch.float64)
                assert_as_accurate(call.run(native, reduce), call.run(reference, reduce), truth, largest)


@pytest.mark.parametrize(("level", "dtype"), OWN_CASES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_reach_as_accurate_as_pytorch(
    level: str, dtype: torch.dtype, option: str, reduce: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMDPO_CPU_LEVEL", level)
    for sizes in SIZES.values():
        for tree in (False, True):
            call = make_call(sizes, dtype, OPTIONS[option], tree, reach=True)
            largest = call.largest_score()
            truth = call.run(reference, reduce, torch.float64)
            assert_as_accurate(call.run(native, reduce), call.run(reference, reduce), truth, largest)
            grad = torch.randn_like(truth)
            ours, plain = (call.run_backward(module, reduce, grad.float()) for module in (native, reference))
            exact = call.run_backward(reference, reduce, grad, torch.float64)
            for mine, theirs, want in zip(ours, plain, exact, strict=True):
                assert_sums_as_accurate(mine, theirs, want, largest)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("reach", [False, True])
def test_float64_is_float64(option: str, lse: bool, reduce: str | None, reach: bool) -> None:
    for sizes in SIZES.values():
        call = make_call(sizes, torch.float64, OPTIONS[option], lse=lse, reach=reach)
        torch.testing.assert_close(call.run(native, reduce), call.run(reference, reduce), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("level", [*LEVELS, "amx_emulated"])
def test_half_precision_inputs_are_read_exactly(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With D = 1 and a query of 1 the score is the key itself: subnormals, largest values and signs come through."""
    monkeypatch.setenv("MMDPO_CPU_LEVEL", level)
    for dtype in (torch.float16, torch.bfloat16):
        info = torch.finfo(dtype)
        values = torch.tensor([0.0, -0.0, info.smallest_normal, info.smallest_normal / 4, -1.5, 3.25, info.max, info.min])
        for value in values.to(dtype):
            key = torch.stack([value, value.new_tensor(0.0)])[None, None, :, None]
            query = torch.ones(1, 1, 1, 1, dtype=dtype)
            segments, rows = torch.tensor([[0, 1]]), torch.tensor([[1]])
            # Scores of size one, as far as a float32 scale reaches.
            scale = min(2.0**120, 1.0 / max(abs(float(value)), 2.0**-130))
            got = native.forward(query, key, AttentionMassCall(segments, rows, 2, None, None, scale, None, None, None))
            want = torch.tensor([float(value) * scale, 0.0], dtype=torch.float64).softmax(0)
            torch.testing.assert_close(got.flatten().double(), want, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize(("level", "dtype"), OWN_CASES)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("lse", [False, True])
def test_rows_that_see_nothing_and_unused_rows_are_zero(
    level: str, dtype: torch.dtype, reduce: str | None, lse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMDPO_CPU_LEVEL", level)
    call = make_call(SIZES["odd"], dtype, {})
    call.tree_end = torch.arange(67, dtype=torch.int32).repeat(2, 1)
    call.lse = torch.full((2, 6, 5), float("-inf")) if lse else None
    assert (call.run(native, reduce) == 0).all()
    call = make_call(SIZES["odd"], dtype, {})
    call.row_positions[1] = -1
    assert (call.run(native, reduce)[1] == 0).all()


@pytest.mark.parametrize(("level", "dtype"), OWN_CASES)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_invisible_keys_leave_no_trace(
    level: str, dtype: torch.dtype, reduce: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding may hold anything, NaN included; NaN in a visible key shows."""
    monkeypatch.setenv("MMDPO_CPU_LEVEL", level)
    call = make_call(SIZES["odd"], dtype, {}, tree=False)
    call.tree_end = torch.full((2, 67), 67, dtype=torch.int32)
    call.tree_end[:, 40:50] = torch.arange(40, 50, dtype=torch.int32)
    want = call.run(native, reduce)
    key = call.key.clone()
    key[:, :, 40:50] = float("nan")
    call.key = key
    assert torch.equal(call.run(native, reduce), want)
    key[0, :, 0] = float("nan")
    assert call.run(native, reduce)[0].isnan().any()


@pytest.mark.parametrize("level", PAIRED)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_products_of_bfloat16_are_a_level_s_own(level: str, reduce: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen in the last bits, as these products add up in another order. In everything else the level is the one below."""
    below = LEVELS[LEVELS.index(level) - 1] if level in LEVELS else "generic"
    same = {}
    calls = {dtype: make_call(Sizes(2, 6, 2, 9, 300, 80), dtype, {}) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    calls["large"] = make_call(Sizes(2, 6, 2, 9, 300, 80), torch.bfloat16, {})
    # The matrix units would take these queries for zeros, whose scores on these keys are as large as any.
    calls["large"].query_rows[..., 0], calls["large"].key[..., 0] = 2.0**-127, 2.0**127
    calls["wide scale"] = make_call(Sizes(2, 6, 2, 9, 300, 80), torch.bfloat16, {"scale": 2.0**24})
    for name, call in calls.items():
        found, gradients = [], []
        grad = torch.randn_like(call.run(native, reduce))
        for either in (level, below):
            monkeypatch.setenv("MMDPO_CPU_LEVEL", either)
            found.append(call.run(native, reduce))
            gradients.append(torch.cat([each.flatten() for each in call.run_backward(native, reduce, grad)]))
        same[name] = torch.equal(*found), torch.equal(*gradients)
    mass, gradient = same.pop(torch.bfloat16)
    # A mean of few segments may come out the same.
    assert not gradient and (not mass or reduce == "mean")
    assert same == dict.fromkeys([torch.float32, torch.float16, "large", "wide scale"], (True, True))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_threads_do_not_change_the_result(reduce: str | None) -> None:
    call = make_call(Sizes(2, 16, 4, 40, 500, 64), torch.float32, {})
    one = call.run(native, reduce)
    torch.set_num_threads(3)
    torch.testing.assert_close(call.run(native, reduce), one, rtol=1e-6, atol=1e-9)


def test_no_segments_and_no_rows() -> None:
    call = make_call(SIZES["odd"], torch.float32, {})
    call.segments.fill_(-1)
    call.num_segments = 0
    assert call.run(native, None).shape == (2, 6, 5, 0)
    assert call.run(native, "mean").shape == (2, 0)
    torch.testing.assert_close(call.run(native, "tokens"), call.run(reference, "tokens"))
    call.query_rows, call.row_positions, call.num_segments = call.query_rows[:, :, :0], call.row_positions[:, :0], 4
    assert call.run(native, None).shape == (2, 6, 0, 4)
    assert (call.run(native, "mean") == 0).all()


@pytest.mark.parametrize(("level", "dtype"), CASES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("lse", [False, True])
def test_gradients_are_as_accurate_as_pytorch_s(
    level: str, option: str, lse: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMDPO_CPU_LEVEL", level)
    for sizes in SIZES.values():
        for tree in (False, True):
            call = make_call(sizes, dtype, OPTIONS[option], tree, lse)
            largest = call.largest_score()
            for reduce in REDUCTIONS:
                grad = torch.randn_like(call.run(reference, reduce))
                truth = call.run_backward(reference, reduce, grad.double(), torch.float64)
                ours, torchs = call.run_backward(native, reduce, grad), call.run_backward(reference, reduce, grad)
                for found, expected, true in zip(ours, torchs, truth, strict=True):
                    assert_sums_as_accurate(found, expected, true, largest)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_float64_gradients_are_float64(option: str, lse: bool, reduce: str | None) -> None:
    for sizes in SIZES.values():
        call = make_call(sizes, torch.float64, OPTIONS[option], lse=lse)
        grad = torch.randn_like(call.run(reference, reduce))
        torch.testing.assert_close(
            call.run_backward(native, reduce, grad), call.run_backward(reference, reduce, grad), rtol=1e-11, atol=1e-13
        )


@pytest.mark.parametrize(("level", "dtype"), OWN_CASES)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_rows_that_see_nothing_and_unused_rows_have_no_gradient(
    level: str, dtype: torch.dtype, reduce: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMDPO_CPU_LEVEL", level)
    monkeypatch.setattr(torch, "empty", nan_filled)
    call = make_call(SIZES["odd"], dtype, {})
    grad = torch.randn_like(call.run(reference, reduce))
    call.tree_end = torch.arange(67, dtype=torch.int32).repeat(2, 1)
    assert all((found == 0).all() for found in call.run_backward(native, reduce, grad))
    call = make_call(SIZES["odd"], dtype, {})
    call.row_positions[1] = -1
    assert all((found[1] == 0).all() for found in call.run_backward(native, reduce, grad))


def nan_filled(*shape: object, **options: object) -> Tensor:
    return torch.full(shape[0] if isinstance(shape[0], (tuple, list)) else shape, float("nan"), **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_threads_do_not_change_gradients(reduce: str | None) -> None:
    call = make_call(Sizes(2, 16, 4, 40, 500, 64), torch.float32, {})
    grad = torch.randn_like(call.run(reference, reduce))
    one = call.run_backward(native, reduce, grad)
    torch.set_num_threads(3)
    assert all(torch.equal(*pair) for pair in zip(call.run_backward(native, reduce, grad), one, strict=True))


@pytest.mark.parametrize("wanted", ["query", "key", "both"])
def test_gradients_through_the_op_are_the_reference_s(wanted: str) -> None:
    call = make_call(SIZES["odd"], torch.float64, {})
    found = []
    for backend in ("native", "reference"):
        query, key = call.query_rows.detach().clone(), call.key.detach().clone()
        leaves = {"query": (query,), "key": (key,), "both": (query, key)}[wanted]
        for leaf in leaves:
            leaf.requires_grad_()
        mass = attention_mass(
            query, key, call.segments, row_positions=call.row_positions, num_segments=4, tree_end=call.tree_end, backend=backend
        )
        found.append(torch.autograd.grad(mass.square().sum(), leaves))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("segments", 4, r"segments must lie in \[-1, 4\), got 4"),
        ("row_positions", 67, r"row_positions must lie in \[-1, 67\), got 67"),
    ],
)
def test_values_out_of_range_are_errors(argument: str, value: int, message: str) -> None:
    call = make_call(SIZES["odd"], torch.float32, {})
    getattr(call, argument)[1, 2] = value
    with pytest.raises(ValueError, match=message):
        call.run(native, None)


def test_an_unknown_level_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMDPO_CPU_LEVEL", "sse9")
    reason = native.unavailable_reason("cpu", torch.float32)
    assert reason is not None and "MMDPO_CPU_LEVEL" in reason and "'sse9'" in reason and "generic" in reason


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.unavailable_reason("cpu", torch.float32) is None
    assert "int32" in (native.unavailable_reason("cpu", torch.int32) or "")
    assert "xpu" in (native.unavailable_reason("xpu", torch.float32) or "")
    if not torch.cuda.is_available():
        assert "cuda" in (native.unavailable_reason("cuda", torch.float32) or "").lower()
    monkeypatch.setattr(native, "load", lambda: SimpleNamespace(cuda_targets=[]))
    assert "built without CUDA" in (native.unavailable_reason("cuda", torch.float32) or "")


@pytest.mark.skipif(not getattr(MODULE, "cuda_targets", ()), reason="the extension was built without CUDA")
def test_calls_that_the_cuda_kernels_refuse() -> None:
    def reason(dtype: torch.dtype, head_dim: int, num_segments: int) -> str:
        return MODULE.attention_mass_cuda_unserved(MODULE.dtypes.index(native.DTYPES[dtype]), head_dim, num_segments)

    assert reason(torch.bfloat16, 128, 32) == reason(torch.float32, 256, 0) == ""
    assert "float64" in reason(torch.float64, 64, 1)
    assert "head size" in reason(torch.float16, 100, 1) and "head size" in reason(torch.float16, 264, 1)
    assert "segments" in reason(torch.float16, 64, 33)


def test_heads_for_the_gpu_start_at_multiples_of_16_bytes() -> None:
    whole = torch.randn(2, 3, 5, 24, dtype=torch.bfloat16)
    assert native._aligned_heads(whole.transpose(1, 2)).data_ptr() == whole.data_ptr()
    for off in (whole[..., 1:17], whole[..., ::2], whole.flatten()[4 : 4 + 2 * 3 * 5 * 8].view(2, 3, 5, 8)):
        copy = native._aligned_heads(off)
        assert torch.equal(copy, off) and copy.is_contiguous() and copy.data_ptr() % 16 == 0


def test_a_package_without_the_extension_imports_and_says_what_to_do() -> None:
    program = (
        "import sys; sys.modules['mmdpo_kernels._native'] = None\n"
        "import mmdpo_kernels, torch\n"
        "reason = mmdpo_kernels.backends()['attention_mass']['native']\n"
        "assert 'pip install .' in reason, reason\n"
        "mmdpo_kernels.attention_mass(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), torch.zeros(1, 1).int(),"
        " row_positions=torch.zeros(1, 1).int(), num_segments=1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("reduce", [None, "mean", "tokens"])
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("where", ["query", "key"])
def test_nan_is_not_lost(reduce: str | None, with_lse: bool, where: str) -> None:
    """A visible NaN score makes its row NaN, as in the reference; a NaN key that no row sees changes nothing."""
    query, key = torch.randn(1, 2, 2, 8), torch.randn(1, 1, 70, 8)
    segments, rows = torch.arange(70)[None] % 3, torch.tensor([[20, 40]])
    lse = torch.zeros(1, 2, 2) if with_lse else None

    def both() -> tuple[Tensor, Tensor]:
        call = AttentionMassCall(segments, rows, 3, None, lse, 0.3, None, None, reduce)
        return native.forward(query, key, call), reference.forward(query, key, call)

    key[0, 0, 60] = float("nan")
    clean = both()
    assert not clean[0].isnan().any()
    torch.testing.assert_close(*clean)
    if where == "query":
        query[0, 0, 1] = float("nan")
    else:
        key[0, 0, 30] = float("nan")
    got, want = both()
    # The reference's matrix product also spreads a NaN over the row's other segments.
    assert want.isnan().any()
    assert torch.equal(got.isnan().any(-1), want.isnan().any(-1))
