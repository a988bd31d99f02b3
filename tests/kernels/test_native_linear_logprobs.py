"""The C++ `linear_logprobs` against the reference, at every SIMD level this CPU has."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmdpo_kernels import linear_logprobs
from mmdpo_kernels.backends.logit_options import LogitOptions
from mmdpo_kernels.backends.native import extension, linear_logprobs_cpu
from mmdpo_kernels.backends.native import linear_logprobs as native
from mmdpo_kernels.backends.reference import linear_logprobs as reference

MODULE = extension.load()
ALL_LEVELS = [] if isinstance(MODULE, str) else MODULE.supported_cpu_levels()
LEVELS = [level for level in ALL_LEVELS if level != "amx"]
STATS = ("entropy", "max_logp", "is_top1", "mean_logit")
PLAIN = LogitOptions(None, 1.0, 1.0, -100)
OPTIONS = {
    "plain": PLAIN,
    "softcap": LogitOptions(4.0, 1.0, 1.0, -100),
    "scaled": LogitOptions(None, 0.4, 1.7, -1),
    "all": LogitOptions(3.0, -1.5, 0.7, 5),
}
# Rows and vocabulary: nothing, one entry, less than a vector, tiles of 64 and a part, whole tiles, several blocks of 64 rows.
SIZES = [(0, 5), (1, 1), (7, 5), (7, 1000), (5, 192), (200, 333)]
HALVES = [torch.bfloat16, torch.float16]
WIDENED, MULTIPLIED = "widened", "multiplied"
PRODUCTS = [(torch.float32, WIDENED), (torch.bfloat16, WIDENED), (torch.bfloat16, MULTIPLIED), (torch.float16, WIDENED)]
"""Inputs, and what products are of: float32, or bfloat16 as on a CPU that multiplies it. PyTorch's products of it run on any CPU."""
EVERYTHING = (True, True, True)
GRADIENTS = ("row gradient", "hidden", "weight", "bias")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_logprobs_cpu, "TILE_COLUMNS", 64)
    monkeypatch.setattr(linear_logprobs_cpu, "BLOCK_ROWS", 64)
    monkeypatch.setattr(linear_logprobs_cpu, "BACKWARD_ELEMENTS", 50 * 333)


@pytest.fixture(autouse=True)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the test's parameter says; else as on a CPU that multiplies float32 alone, wherever the test runs."""
    how = request.node.callspec.params.get("how", WIDENED) if hasattr(request.node, "callspec") else WIDENED
    monkeypatch.setattr(linear_logprobs_cpu, "_multiplies_bfloat16", lambda: how == MULTIPLIED)


class Call(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    options: LogitOptions
    grad_logps: Tensor

    def to(self, dtype: torch.dtype) -> Call:
        bias = None if self.bias is None else self.bias.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return self._replace(
            hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias, grad_logps=self.grad_logps.to(wide)
        )

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, LogitOptions]:
        return self.hidden, self.weight, self.targets, self.bias, self.options

    def by_reference(self) -> dict[str, Tensor | None]:
        logps, stats = reference.forward(*self.inputs, STATS)
        ones = torch.ones_like(self.grad_logps)
        row_gradient = reference.backward(ones, *self.inputs, (True, False, False))[0]
        grads = reference.backward(self.grad_logps, *self.inputs, (True, True, self.bias is not None))
        return {"logps": logps, **stats, "row gradient": row_gradient} | dict(
            zip(("hidden", "weight", "bias"), grads, strict=True)
        )

    def by_native(self) -> dict[str, Tensor | None]:
        """From what forward kept."""
        rows = self.hidden.shape[0]
        kept = native.empty_kept(self.hidden, self.weight)
        logps, stats, row_gradient = native.forward_with_gradient(*self.inputs, STATS, rows, kept)
        needs = (False, True, self.bias is not None)
        grads = native.backward_kept(self.grad_logps, kept, self.hidden, self.weight, self.targets, self.options, needs)
        return {"logps": logps, **stats, "row gradient": row_gradient} | dict(zip(("weight", "bias"), grads, strict=True))

    def by_native_again(self) -> dict[str, Tensor | None]:
        """From logits made again in backward."""
        logps, stats = native.forward(*self.inputs, STATS)
        grads = native.backward(self.grad_logps, *self.inputs, (True, True, self.bias is not None))
        return {"logps": logps, **stats} | dict(zip(("hidden", "weight", "bias"), grads, strict=True))


def make_call(
    rows: int,
    vocabulary: int,
    dtype: torch.dtype = torch.float32,
    options: LogitOptions = PLAIN,
    *,
    bias: bool = True,
    hidden_size: int = 24,
) -> Call:
    torch.manual_seed(0)
    targets = torch.randint(0, vocabulary, (rows,))
    targets[1::4] = options.ignore_index
    made = torch.randn(rows, hidden_size), torch.randn(vocabulary, hidden_size), torch.randn(vocabulary), torch.randn(rows)
    call = Call(made[0], made[1], targets, made[2] if bias else None, options, made[3])
    return call.to(dtype)


def check(call: Call) -> None:
    """|truth - ours| <= 2 |truth - plain PyTorch| + one rounding step, for each entry of what both ways return.

    The step is that of the logits, of which logarithms are differences and whose rounding moves probabilities; and for the head's
    gradients that of the dtype coefficients are kept in. Plain PyTorch may hit an entry by luck, so it is the largest entry's.
    """
    exact_call = call.to(torch.float64)
    truth, plain = exact_call.by_reference(), call.by_reference()
    used = call.targets != call.options.ignore_index
    logits = reference.logits_of(torch.nn.functional.linear(*exact_call.inputs[:2], exact_call.bias), call.options)[used]
    largest = float(logits[logits.isfinite()].abs().amax()) if used.any() else 0.0
    for found in (call.by_native(), call.by_native_again()):
        for name, mine in found.items():
            exact, theirs = truth[name], plain[name]
            if exact is None or theirs is None or mine is None:
                assert mine is None and exact is None, name
                continue
            assert mine.dtype == torch.float32 and mine.shape == exact.shape, name
            assert torch.equal(mine.isinf(), exact.isinf()) and not mine.isnan().any(), name
            finite = exact.isfinite()
            size = float(exact[finite].abs().amax()) if exact[finite].numel() else 0.0
            step = torch.finfo(native.logit_dtype(call.hidden)).eps * (
                (1 + 2 * largest) * size if name in GRADIENTS else size + 2 * largest
            )
            step += torch.finfo(call.hidden.dtype).eps * size if name in ("weight", "bias") else 0.0
            excess = ((exact - mine).abs() - 2 * (exact - theirs).abs() - step)[finite]
            assert not (excess > 0).any(), f"{name}: beyond the bound by {excess.max():.2e}"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype, how", PRODUCTS)
def test_as_accurate_as_pytorch(
    level: str, option: str, size: tuple[int, int], dtype: torch.dtype, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMDPO_CPU_LEVEL", level)
    for bias in (True, False):
        check(make_call(*size, dtype, OPTIONS[option], bias=bias))


@pytest.mark.parametrize("level", [level for level in ALL_LEVELS if level == "amx"])
def test_amx_is_avx512_here(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(200, 333)
    # Sums of whole numbers are exact in any order, which in a product depends on where memory begins.
    for matrix in call.inputs[:2]:
        matrix.detach().round_()
    found = []
    for either in (level, "avx512", "generic"):
        monkeypatch.setenv("MMDPO_CPU_LEVEL", either)
        found.append((native.forward_with_gradient(*call.inputs, STATS, 200, None)[0], MODULE.multiplies_bfloat16()))
    assert torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][0], found[2][0])
    assert [multiplies for _, multiplies in found] == [True, True, False]


@pytest.mark.parametrize("dtype, how", PRODUCTS)
def test_tiles_as_they_are_shipped(dtype: torch.dtype, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(linear_logprobs_cpu, "_multiplies_bfloat16", lambda: how == MULTIPLIED)
    check(make_call(40, 3000, dtype, hidden_size=64))


@pytest.mark.parametrize("option", OPTIONS)
def test_rows_without_a_gradient_are_scored_alike(option: str) -> None:
    """60 of 200 rows: a block of both kinds, and blocks of one."""
    call = make_call(200, 333, options=OPTIONS[option])
    logps, stats, gradient = native.forward_with_gradient(*call.inputs, STATS, 200, None)
    for count in (60, 64, 0):
        kept = native.empty_kept(call.hidden[:count], call.weight)
        found = native.forward_with_gradient(*call.inputs, STATS, count, kept)
        torch.testing.assert_close(found, (logps, stats, gradient[:count]), rtol=1e-5, atol=1e-5)
        few = call._replace(hidden=call.hidden[:count], targets=call.targets[:count], grad_logps=call.grad_logps[:count])
        got = native.backward_kept(few.grad_logps, kept, few.hidden, few.weight, few.targets, few.options, EVERYTHING)
        torch.testing.assert_close(got, reference.backward(few.grad_logps, *few.inputs, EVERYTHING)[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype, how", PRODUCTS[:3])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("remainder", [1e-2, 1e-6, 1e-8])
@pytest.mark.parametrize("target", [0, 150, 299])
def test_a_nearly_certain_target_keeps_its_gradient(
    dtype: torch.dtype, how: str, softcap: float | None, remainder: float, target: int
) -> None:
    """1 - p(target) about `remainder`, which float32 cannot hold beside 1: gradients keep all the digits of their dtype.

    The hidden state is one element 1, so that products have no error of their own.
    """
    weight = torch.randint(-8, 9, (300, 1)) / 64
    weight[target] = 8.0
    others = torch.arange(300) != target
    shift = math.log(remainder) + 8.0 - float(weight[others].logsumexp(0))
    bias = torch.where(others, round(shift * 8) / 8, 0.0)
    call = Call(torch.ones(1, 1), weight, torch.tensor([target]), bias, PLAIN._replace(softcap=softcap), torch.ones(1)).to(dtype)
    truth, found, again = call.to(torch.float64).by_reference(), call.by_native(), call.by_native_again()
    for got, name in ((found, "row gradient"), (found, "weight"), (found, "bias"), (again, "hidden")):
        mine, exact = got[name], truth[name]
        assert mine is not None and exact is not None
        # tanh is rounded to float32 before logits are subtracted. The head's gradients come from coefficients in the inputs' dtype.
        digits = (4 if softcap is None else 64) * torch.finfo(torch.float32).eps
        digits += torch.finfo(dtype).eps if name in ("weight", "bias") or how == MULTIPLIED else 0.0
        torch.testing.assert_close(mine.double(), exact, rtol=digits, atol=digits * float(exact.abs().max()))


@pytest.mark.parametrize("option", ["plain", "scaled"])
@pytest.mark.parametrize("dtype, how", PRODUCTS[:3])
def test_tokens_that_cannot_come(option: str, dtype: torch.dtype, how: str) -> None:
    """A bias of -inf, on a whole first tile and on more: probability and gradient 0, nothing spoilt."""
    call = make_call(30, 333, dtype, OPTIONS[option])
    assert call.bias is not None
    call.bias[:70] = float("-inf")
    call.bias[200:205] = float("-inf")
    allowed = call.bias.isfinite().nonzero()[:, 0]
    used = call.targets != call.options.ignore_index
    call = call._replace(targets=allowed[call.targets.clamp(min=0) % len(allowed)].where(used, call.options.ignore_index))
    check(call)
    assert call.by_native()["bias"][:70].eq(0).all()  # type: ignore[index]


@pytest.mark.parametrize("dtype, how", PRODUCTS[:3])
def test_what_is_not_finite_stays_so_and_where_it_is(dtype: torch.dtype, how: str) -> None:
    call = make_call(9, 200, dtype)
    call.hidden[3, 0] = float("nan")
    call.hidden[6, 0] = float("inf")
    assert call.targets[3] >= 0 and call.targets[6] >= 0
    found = call.by_native()
    for name in ("logps", "entropy", "row gradient"):
        values = found[name]
        assert values is not None
        bad = ~values.isfinite().reshape(9, -1).all(1)
        assert bad.nonzero()[:, 0].tolist() == [3, 6], name


@pytest.mark.parametrize("dtype, how", PRODUCTS[:3])
def test_ignored_rows_may_hold_anything(dtype: torch.dtype, how: str) -> None:
    call = make_call(9, 200, dtype)
    call.hidden[1] = float("inf")
    call.hidden[5] = float("nan")
    assert call.targets[1] == call.targets[5] == -100
    found = call.by_native()
    for name in ("logps", *STATS, "row gradient"):
        values = found[name]
        assert values is not None and bool(values.isfinite().all()) and bool((values[[1, 5]] == 0).all()), name


def test_all_rows_ignored() -> None:
    call = make_call(70, 100)
    call.targets.fill_(-100)
    for found in (call.by_native(), call.by_native_again()):
        assert all(values is not None and bool((values == 0).all()) for values in found.values())


@pytest.mark.parametrize("dtype, how", PRODUCTS[:3])
def test_any_strides(dtype: torch.dtype, how: str) -> None:
    """Rows of a wider tensor, every second row, a weight that is the transpose of one, an expanded upstream gradient."""
    call = make_call(40, 100, dtype)
    wide = torch.cat((call.hidden, call.hidden), dim=1)[:, :24]
    sparse = call.hidden.repeat_interleave(2, dim=0)[::2]
    for hidden in (wide, sparse):
        check(call._replace(hidden=hidden, weight=call.weight.T.contiguous().T, grad_logps=torch.ones(()).expand(40)))


def test_only_what_is_needed() -> None:
    call = make_call(30, 100)
    exact = reference.backward(call.grad_logps, *call.inputs, EVERYTHING)
    for place in range(3):
        needs = (place == 0, place == 1, place == 2)
        found = native.backward(call.grad_logps, *call.inputs, needs)
        assert [grad is not None for grad in found] == list(needs)
        torch.testing.assert_close(found[place], exact[place], rtol=1e-4, atol=1e-5)


def test_kept_is_known_from_shapes() -> None:
    call = make_call(30, 100, torch.bfloat16)
    real = native.empty_kept(call.hidden, call.weight)
    with FakeTensorMode() as mode:
        fake = native.empty_kept(mode.from_tensor(call.hidden), mode.from_tensor(call.weight))
    assert [(t.shape, t.dtype, t.device) for t in real] == [(t.shape, t.dtype, t.device) for t in fake]
    assert real[0].shape == (30, 100) and real[0].dtype == torch.bfloat16


def fold_tile(logits: Tensor, targets: Tensor, gradient: Tensor, threads: int) -> tuple[Tensor, Tensor]:
    """A tile that is the whole vocabulary -> coefficients of the rows that `gradient`, of sums so far, has; and the state."""
    native = extension.module("linear_logprobs")
    rows, count = logits.shape
    tile, state = logits.clone(), torch.zeros(len(native.logit_states), rows, dtype=torch.float64)
    state[0] = float("-inf")
    args = native.LogitRowsArgs(
        rows=rows,
        coefficient_rows=gradient.shape[0],
        targets=targets.data_ptr(),
        ignore_index=-100,
        bias=0,
        softcap=0.0,
        logit_scale=1.0,
        temperature=1.0,
        coefficient_scale=1.0,
        entropy=True,
        state=state.data_ptr(),
        accumulator=gradient.data_ptr(),
        hidden_size=gradient.shape[1],
    )
    dtype = native.dtypes.index(str(logits.dtype).removeprefix("torch."))
    native.fold_logit_tile(args, logits=tile.data_ptr(), dtype=dtype, stride=count, first=0, count=count, num_threads=threads)
    return tile[: gradient.shape[0]], state


@pytest.mark.parametrize("level", LEVELS)
def test_logits_of_bfloat16_are_rounded_as_pytorch_rounds_them(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of one row whose peak is 0: coefficients are exponentials, NaN among them; a row that ends within a vector."""
    monkeypatch.setenv("MMDPO_CPU_LEVEL", level)
    logits = -torch.rand(1, 333).mul(20).bfloat16()
    logits[0, 7], logits[0, 100] = 0.0, float("-inf")
    logits[0, 332] = float("nan")
    found, _ = fold_tile(logits, torch.tensor([5]), torch.zeros(1, 1), threads=1)
    exact = logits.float().exp()
    exact[0, 5] = 0.0
    # An exponential is right to a unit in the last place of float32, which may lie on either side of a tie.
    torch.testing.assert_close(found.float(), exact.bfloat16().float(), rtol=2**-8, atol=0.0, equal_nan=True)
    same = (found == exact.bfloat16()) | found.isnan()
    assert same.float().mean() > 0.99


def test_fold_does_not_depend_on_threads() -> None:
    """More threads than rows, enough logits for all of them; the products are PyTorch's own."""
    logits, targets = torch.randn(16, 40_000), torch.randint(0, 40_000, (16,))
    found = []
    for threads in (1, 3, 40):
        sums = torch.ones(8, 3)
        found.append((*fold_tile(logits, targets, sums, threads), sums))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype, how", PRODUCTS[:3])
@pytest.mark.parametrize("trained, kept_bytes", [(False, 0), (True, 0), (True, 1 << 20)])
def test_through_the_op(dtype: torch.dtype, how: str, trained: bool, kept_bytes: int) -> None:
    """Gradients by autograd, rows of a reference model beside the policy's, whatever the threads."""
    call = make_call(90, 333, dtype)
    leaves = [call.hidden.requires_grad_()]
    if trained:
        assert call.bias is not None
        leaves += [call.weight.requires_grad_(), call.bias.requires_grad_()]
    torch.set_num_threads(2)
    results = []
    for backend in ("native", "reference"):
        found = linear_logprobs(
            call.hidden,
            call.weight,
            call.targets,
            bias=call.bias,
            stats=STATS,
            reference_hidden=call.hidden.detach()[:40],
            reference_targets=call.targets[:40],
            kept_bytes=kept_bytes,
            backend=backend,
        )
        assert found.reference_logps is not None
        values = [found.logps, found.reference_logps, *(getattr(found, name) for name in STATS if name != "is_top1")]
        results.append([*values, *torch.autograd.grad(found.logps, leaves, call.grad_logps)])
    coarse = 0.05 if dtype == torch.bfloat16 else 1e-4
    for mine, plain in zip(*results, strict=True):
        assert mine.dtype == plain.dtype
        torch.testing.assert_close(mine, plain, rtol=coarse, atol=4 * coarse)


def test_what_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.unavailable_reason("cpu", torch.float32) is None
    assert native.unavailable_reason("cpu", torch.float64) == "it takes float32, bfloat16 and float16, got torch.float64"
    assert native.unavailable_reason("meta", torch.float32) == "it runs on cpu and cuda tensors, got meta"
    monkeypatch.setenv("MMDPO_CPU_LEVEL", "avx1024")
    assert "MMDPO_CPU_LEVEL" in str(native.unavailable_reason("cpu", torch.float32))
