"""linear_logprobs: both backends against log_softmax, gradients, statistics, memory, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from trees import assert_accurate

from mmdpo_kernels import linear_logprobs
from mmdpo_kernels.backends.chunked import linear_logprobs as chunked

BACKENDS = ["reference", "chunked"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows of 37 logits a chunk, so that every test crosses chunk edges."""
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 3 * 37)


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


def test_chunked_never_holds_all_logits() -> None:
    hidden, weight, _, targets = case(90)
    hidden.requires_grad_()
    with _Largest() as seen:
        linear_logprobs(hidden, weight, targets, backend="chunked").logps.sum().backward()
    assert 3 * 37 <= seen.size < 90 * 37 / 2


class _Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [(None, 1.0, 1.0), (2.0, 1.5, 0.7)])
def test_frozen_head_takes_two_products(options: tuple[float | None, float, float]) -> None:
    """Logits and gradient once per chunk, all in forward; the gradient is that of a head that is trained."""
    hidden, weight, bias, targets = case()
    softcap, scale, temperature = options
    settings = {"softcap": softcap, "logit_scale": scale, "temperature": temperature, "backend": "chunked"}
    up = torch.randn(11, dtype=torch.float64)
    hidden.requires_grad_()
    with _Products() as forward:
        logps = linear_logprobs(hidden, weight, targets, bias=bias, **settings).logps  # type: ignore[arg-type]
    with _Products() as backward:
        (grad,) = torch.autograd.grad(logps, hidden, up)
    with _Products() as without, torch.no_grad():
        linear_logprobs(hidden, weight, targets, bias=bias, **settings)  # type: ignore[arg-type]
    assert (forward.count, backward.count, without.count) == (8, 0, 4)
    weight.requires_grad_()
    trained = linear_logprobs(hidden, weight, targets, bias=bias, **settings).logps  # type: ignore[arg-type]
    torch.testing.assert_close(logps, trained)
    torch.testing.assert_close(grad, torch.autograd.grad(trained, hidden, up)[0])


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_that_cannot_come(backend: str) -> None:
    """A bias of -inf takes a token out; entropy stays finite, ignored rows stay 0."""
    hidden, weight, bias, targets = case()
    bias[36] = float("-inf")
    targets = targets.where(targets != 36, 0)
    found = linear_logprobs(hidden, weight, targets, bias=bias, stats=("entropy",), backend=backend)
    logp = (hidden @ weight[:36].T + bias[:36]).log_softmax(-1)
    torch.testing.assert_close(found.entropy, -(logp.exp() * logp).sum(-1) * (targets != -100))
