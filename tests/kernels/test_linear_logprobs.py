"""linear_logprobs: both backends against log_softmax, gradients, statistics, memory, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from trees import assert_accurate

from mmdpo_kernels import linear_logprobs
from mmdpo_kernels.backends.chunked import linear_logprobs as chunked
from mmdpo_kernels.backends.chunked import row_chunks
from mmdpo_kernels.backends.logit_options import LogitOptions
from mmdpo_kernels.op_names import NAMESPACE

BACKENDS = ["reference", "chunked"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows of 37 logits a chunk, so that every test crosses chunk edges."""
    monkeypatch.setattr(row_chunks, "CHUNK_ELEMENTS", {"cpu": 3 * 37})


def case(rows: int = 11, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    targets = torch.randint(0, 37, (rows,))
    targets[1::4] = -100
    make = torch.randn(rows, 16, dtype=dtype), torch.randn(37, 16, dtype=dtype), torch.randn(37, dtype=dtype)
    return make[0], make[1], make[2], targets


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, softcap: float | None, scale: float, t: float) -> Tensor:
    logits = (hidden @ weight.T + bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logps = (logits / t).log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return logps * (targets != -100)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [(None, 1.0, 1.0), (3.0, 1.0, 1.0), (None, 0.5, 1.0), (2.0, 1.5, 0.7)])
@pytest.mark.parametrize("rows", [1, 2, 11])
def test_forward_and_backward(backend: str, options: tuple[float | None, float, float], rows: int) -> None:
    hidden, weight, bias, targets = case(rows)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    softcap, scale, temperature = options
    got = linear_logprobs(
        hidden, weight, targets, bias=bias, softcap=softcap, logit_scale=scale, temperature=temperature, backend=backend
    ).logps
    want = plain(hidden, weight, bias, targets, *options)
    torch.testing.assert_close(got, want)
    up = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, up), torch.autograd.grad(want, leaves, up))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    hidden, weight, bias, targets = case(5)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]

    def run(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_logprobs(h, w, targets, bias=b, softcap=4.0, backend=backend).logps

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics(backend: str) -> None:
    hidden, weight, bias, targets = case()
    names = ("entropy", "max_logp", "is_top1", "mean_logit")
    found = linear_logprobs(hidden, weight, targets, bias=bias, stats=names, backend=backend)
    logits = hidden @ weight.T + bias
    logp, used = logits.log_softmax(-1), (targets != -100).double()
    torch.testing.assert_close(found.entropy, -(logp.exp() * logp).sum(-1) * used)
    torch.testing.assert_close(found.max_logp, logp.amax(-1) * used)
    torch.testing.assert_close(found.is_top1, (logits.argmax(-1) == targets).double() * used)
    torch.testing.assert_close(found.mean_logit, logits.mean(-1) * used)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy_rule(dtype: torch.dtype) -> None:
    hidden, weight, _, targets = case(40, dtype)
    ours = linear_logprobs(hidden, weight, targets, backend="chunked").logps
    none = torch.zeros(37, dtype=dtype)
    truth = plain(hidden.double(), weight.double(), none.double(), targets, None, 1.0, 1.0)
    torch_same = plain(hidden, weight, none, targets, None, 1.0, 1.0)
    assert_accurate(ours, torch_same, truth)


class _Largest(TorchDispatchMode):
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return out


class _Zeros(_Largest):
    """Of tensors of zeros alone."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "zeros" not in func.name():
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


PLAIN = LogitOptions(None, 1.0, 1.0, -100)


def test_chunked_never_holds_all_logits() -> None:
    hidden, weight, _, targets = case(90)
    with _Largest() as seen:
        chunked.forward_with_gradient(hidden, weight, targets, None, PLAIN, (), 90, None)
        chunked.backward(torch.ones(90, dtype=torch.float64), hidden, weight, targets, None, PLAIN, (True, False, False))
    assert 3 * 37 <= seen.size < 90 * 37 / 2


class _Products(TorchDispatchMode):
    """Counts matrix products."""

    products = (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm.out)
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func in self.products
        return func(*args, **(kwargs or {}))


def test_products() -> None:
    """2u with a frozen head, 1u without a gradient and for rows of the reference, 1u of backward from kept coefficients, 3u without."""
    hidden, weight, bias, targets = case(12)
    up = torch.randn(12, dtype=torch.float64)
    head = False, True, False
    kept = chunked.empty_kept(hidden, weight)
    counts = []
    for run in (
        lambda: chunked.forward_with_gradient(hidden, weight, targets, bias, PLAIN, (), 12, None),
        lambda: chunked.forward(hidden, weight, targets, bias, PLAIN, ()),
        lambda: chunked.forward_with_gradient(hidden, weight, targets, bias, PLAIN, (), 6, None),
        lambda: chunked.forward_with_gradient(hidden, weight, targets, bias, PLAIN, (), 12, kept),
        lambda: chunked.backward_kept(up, kept, hidden, weight, targets, PLAIN, head),
        lambda: chunked.backward(up, hidden, weight, targets, bias, PLAIN, (True, True, False)),
    ):
        with _Products() as products:
            run()
        counts.append(products.count)
    assert counts == [8, 4, 6, 8, 1, 12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy_of_the_gradient(dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = case(40, dtype)
    up = torch.randn(40, dtype=torch.float32)
    grads = []
    for run, kind in ((linear_logprobs, dtype), (plain, dtype), (plain, torch.float64)):
        leaf = hidden.detach().to(kind).requires_grad_()
        if run is plain:
            logps = plain(leaf, weight.to(kind), torch.zeros(37, dtype=kind), targets, None, 1.0, 1.0)
        else:
            logps = linear_logprobs(leaf, weight, targets, backend="chunked").logps
        grads += torch.autograd.grad(logps, leaf, up.to(logps.dtype))
    assert_accurate(*grads)


def test_errors_name_the_argument() -> None:
    hidden, weight, _, targets = case()
    with pytest.raises(ValueError, match=r"weight must have shape \(V, 16\), got \(16, 37\)"):
        linear_logprobs(hidden, weight.T, targets)
    with pytest.raises(ValueError, match="targets must be in"):
        linear_logprobs(hidden, weight, targets + 37)
    with pytest.raises(ValueError, match="stats must be among"):
        linear_logprobs(hidden, weight, targets, stats=("perplexity",))
    with pytest.raises(TypeError, match="one dtype"):
        linear_logprobs(hidden.float(), weight, targets)
    with pytest.raises(ValueError, match="targets must be on the device of hidden, cpu, got meta"):
        linear_logprobs(hidden, weight, targets.to("meta"))
    compiled = torch.compile(lambda targets: linear_logprobs(hidden, weight, targets).logps, backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match="targets must be in"):
        compiled(targets + 37)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_that_cannot_come(backend: str) -> None:
    """A bias of -inf takes a token out; entropy stays finite, ignored rows stay 0."""
    hidden, weight, bias, targets = case()
    bias[36] = float("-inf")
    targets = targets.where(targets != 36, 0)
    found = linear_logprobs(hidden, weight, targets, bias=bias, stats=("entropy",), backend=backend)
    logp = (hidden @ weight[:36].T + bias[:36]).log_softmax(-1)
    torch.testing.assert_close(found.entropy, -(logp.exp() * logp).sum(-1) * (targets != -100))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kept_bytes", [1 << 30, 0])
def test_trained_head_kept_or_made_again(backend: str, kept_bytes: int) -> None:
    hidden, weight, bias, targets = case()
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    found = linear_logprobs(hidden, weight, targets, bias=bias, softcap=2.0, kept_bytes=kept_bytes, backend=backend).logps
    expected = plain(hidden, weight, bias, targets, 2.0, 1.0, 1.0)
    up = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(found, leaves, up), torch.autograd.grad(expected, leaves, up))


@pytest.mark.parametrize("subset", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_subset_of_gradients(backend: str, subset: tuple[int, ...]) -> None:
    hidden, weight, bias, targets = case()
    inputs = hidden, weight, bias
    leaves = [inputs[place].requires_grad_() for place in subset]
    expected = plain(hidden, weight, bias, targets, None, 1.0, 1.0)
    up = torch.randn_like(expected)
    found = linear_logprobs(hidden, weight, targets, bias=bias, backend=backend).logps
    torch.testing.assert_close(torch.autograd.grad(found, leaves, up), torch.autograd.grad(expected, leaves, up))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [False, True])
def test_reference_rows_beside_the_policys(backend: str, trained: bool) -> None:
    hidden, weight, bias, targets = case()
    other = torch.randn(7, 16, dtype=torch.float64)
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    leaves = [hidden, weight] if trained else [hidden]
    both = linear_logprobs(
        hidden, weight, targets, bias=bias, stats=("entropy",), reference_hidden=other, reference_targets=targets[:7],
        backend=backend,
    )  # fmt: skip
    alone = linear_logprobs(hidden, weight, targets, bias=bias, stats=("entropy",), backend=backend)
    assert both.reference_logps is not None and not both.reference_logps.requires_grad
    torch.testing.assert_close(both.reference_logps, linear_logprobs(other, weight.detach(), targets[:7], bias=bias).logps)
    torch.testing.assert_close((both.logps, both.entropy), (alone.logps, alone.entropy))
    up = torch.randn(11, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(both.logps, leaves, up), torch.autograd.grad(alone.logps, leaves, up))
    same = linear_logprobs(hidden, weight, targets, bias=bias, reference_hidden=hidden.detach(), backend=backend)
    torch.testing.assert_close(same.reference_logps, same.logps.detach())


def test_peaked_rows_keep_their_small_gradients() -> None:
    """At p = 1 - 1e-7 the gradient is exact where 1 - p is summed over the others, and half its digits are gone where it is not."""
    torch.manual_seed(0)
    weight = torch.eye(64)[:37]
    targets = torch.arange(37)
    hidden = (weight * 19.7).requires_grad_()
    (grad,) = torch.autograd.grad(linear_logprobs(hidden, weight, targets, backend="chunked").logps.sum(), hidden)
    wide = hidden.detach().double().requires_grad_()
    logps = (wide @ weight.double().T).log_softmax(-1).diagonal()
    (truth,) = torch.autograd.grad(logps.sum(), wide)
    assert 1e-8 < truth.abs().max() < 1e-6
    torch.testing.assert_close(grad.double(), truth, rtol=1e-5, atol=0.0)


def test_autocast_casts_as_a_linear_layer_does() -> None:
    hidden, weight, bias, targets = case(dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = linear_logprobs(hidden.bfloat16(), weight, targets, bias=bias, backend="chunked").logps
        found = linear_logprobs(hidden, weight, targets, bias=bias, backend="chunked").logps
    assert found.dtype == torch.float32
    torch.testing.assert_close(mixed, found)
    half = linear_logprobs(hidden.bfloat16(), weight.bfloat16(), targets, bias=bias.bfloat16(), backend="chunked").logps
    torch.testing.assert_close(found, half)
    grads = torch.autograd.grad(found.sum(), leaves)
    torch.testing.assert_close(grads, torch.autograd.grad(half.sum(), leaves))
    assert all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize("trained", [False, True])
def test_compiled_without_a_break(trained: bool) -> None:
    hidden, weight, bias, targets = case()
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    leaves = [hidden, weight] if trained else [hidden]

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        found = linear_logprobs(hidden * 2, weight, targets, bias=bias, stats=("entropy",), backend="chunked")
        assert found.entropy is not None
        return (found.logps * found.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = compiled(hidden, weight), loss(hidden, weight)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves))


def test_registered_operators_keep_their_promises() -> None:
    """Schema, fake tensors, and the gradient under PyTorch's tracer."""
    hidden, weight, bias, targets = case()
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    for gradient in (0, 1, 2):
        for kept_bytes in (1 << 30, 0):
            options = (None, 1.0, 1.0, -100, "entropy,is_top1", "chunked", gradient, kept_bytes)
            arguments = (leaves[0], hidden.detach(), leaves[1].detach(), leaves[2].detach(), targets, targets, *options)
            checks = ("test_schema", "test_faketensor")
            torch.library.opcheck(getattr(torch.ops, NAMESPACE).linear_logprobs.default, arguments, test_utils=checks)


def test_no_second_derivative() -> None:
    hidden, weight, _, targets = case()
    logps = linear_logprobs(hidden.requires_grad_(), weight, targets).logps
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(logps.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("kept_bytes", [1 << 30, 0])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("backend", [*BACKENDS, "native"])
def test_an_ignored_row_has_no_gradient_whatever_comes_from_above(backend: str, trained: bool, kept_bytes: int) -> None:
    hidden, weight, _, targets = case(dtype=torch.float32)
    leaves = [hidden.requires_grad_(), *([weight.requires_grad_()] if trained else [])]
    up = torch.ones(11).where(targets != -100, float("nan"))
    logps = linear_logprobs(hidden, weight, targets, kept_bytes=kept_bytes, backend=backend).logps
    grads = torch.autograd.grad(logps, leaves, up)
    assert all(grad.isfinite().all() for grad in grads) and not grads[0][targets == -100].any()


def test_backward_makes_no_zeros_for_what_forward_kept() -> None:
    hidden, weight, _, targets = case(300)
    hidden.requires_grad_(), weight.requires_grad_()
    logps = linear_logprobs(hidden, weight, targets, backend="chunked").logps
    with _Zeros() as seen:
        torch.autograd.grad(logps.sum(), (hidden, weight))
    assert seen.size < 300 * 37


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_leaves_float64_alone(dtype: torch.dtype) -> None:
    hidden, weight, _, targets = case(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_logprobs(hidden, weight, targets, backend="chunked").logps
    exact = linear_logprobs(hidden, weight, targets, backend="chunked").logps
    assert torch.equal(found, exact) == (dtype == torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_no_targets(backend: str) -> None:
    hidden, weight, bias, targets = case()
    for rows, wanted in ((hidden[:0], targets[:0]), (hidden, torch.full_like(targets, -100))):
        leaves = [t.detach().requires_grad_() for t in (rows, weight)]
        found = linear_logprobs(leaves[0], leaves[1], wanted, bias=bias, stats=("entropy",), backend=backend)
        assert found.logps.shape == (len(rows),) and not found.logps.any() and not found.entropy.any()
        assert not any(grad.any() for grad in torch.autograd.grad(found.logps.sum(), leaves))
