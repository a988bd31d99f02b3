"""linear_logprobs in Triton, its row kernels first: compiled where there is a GPU, else interpreted, hence few and small sizes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import DEVICE
from torch import Tensor
from trees import assert_accurate

from benchmarks.kernels import sweep_tiles
from mmdpo_kernels import linear_logprobs
from mmdpo_kernels.backends import measured
from mmdpo_kernels.backends.chunked import linear_logprobs as chunked
from mmdpo_kernels.backends.chunked import logit_rows as plain
from mmdpo_kernels.backends.chunked import row_chunks
from mmdpo_kernels.backends.logit_options import LogitOptions
from mmdpo_kernels.backends.native import logit_rows as native_rows
from mmdpo_kernels.backends.reference import linear_logprobs as reference
from mmdpo_kernels.backends.triton import linear_logprobs as triton_backend
from mmdpo_kernels.backends.triton import logit_rows, logit_rows_tiles, measured_tiles

pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow).*:RuntimeWarning:triton")
"""Of the interpreter, about values that a `where` then leaves out."""

OPTIONS = {
    "plain": LogitOptions(None, 1.0, 1.0, -100),
    "scaled": LogitOptions(None, 0.7, 1.3, -1),
    "softcap": LogitOptions(3.0, 1.4, 0.6, -100),
    "negative": LogitOptions(5.0, -1.0, 1.0, -100),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATS = logit_rows.STATS


@pytest.fixture(autouse=True)
def outputs_start_as_nan() -> Iterator[None]:
    # Only warned: on a GPU the matrix products of the comparison are not deterministic.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_blocks(request: pytest.FixtureRequest) -> Iterator[None]:
    if "shipped_blocks" in request.fixturenames:
        yield
        return
    with logit_rows_tiles.override(logit_rows_tiles.Block(16, 1, 2, 255)):
        yield


@pytest.fixture
def shipped_blocks() -> None:
    """Blocks as users get them."""


def make_rows(
    rows: int = 5, width: int = 37, dtype: torch.dtype = torch.float32, option: str = "plain", spread: float = 4.0
) -> tuple[Tensor, Tensor]:
    """Logits that lie in a wider buffer, with NaN after every row; every third target ignored, one a row's likeliest token."""
    buffer = torch.full((rows, width + 3), float("nan"), device=DEVICE).to(dtype)
    logits = buffer[:, :width]
    logits.copy_(spread * torch.randn(rows, width).to(DEVICE))
    targets = torch.randint(0, width, (rows,)).to(DEVICE)
    if rows:
        targets[0] = logits[0].argmax()
    targets[1::3] = OPTIONS[option].ignore_index
    return logits, targets


def truth(
    logits: Tensor, targets: Tensor, options: LogitOptions, stats: tuple[str, ...], scale: float
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """In float64 by autograd: log-probabilities, statistics, coefficients."""
    z = logits.detach().double().requires_grad_()
    x = z * options.logit_scale
    if options.softcap is not None:
        x = options.softcap * torch.tanh(x / options.softcap)
    logp_all = (x / options.temperature).log_softmax(-1)
    used = targets != options.ignore_index
    logps = logp_all.gather(1, targets.where(used, 0)[:, None])[:, 0].where(used, 0.0)
    (grad,) = torch.autograd.grad(logps.sum(), z)
    every = {
        "entropy": -(logp_all.exp() * logp_all.clamp(min=-1e30)).sum(-1),
        "max_logp": logp_all.amax(-1),
        "is_top1": (logps >= logp_all.amax(-1)).double(),
        "mean_logit": (x / options.temperature).mean(-1),
    }
    return logps.detach(), {name: every[name].detach().where(used, 0.0) for name in stats}, scale * grad


def assert_as_accurate(ours: Tensor, torchs: Tensor, truth: Tensor, step: float) -> None:
    """|truth - ours| <= 2 |truth - torch| + step, elementwise."""
    assert ours.dtype == torchs.dtype and ours.shape == torchs.shape and not ours.isnan().any()
    excess = ((ours.double() - truth).abs() - 2 * (torchs.double() - truth).abs() - step).max()
    assert excess <= 0, f"beyond the bound by {excess:.2e}"


def assert_rows(
    logits: Tensor,
    targets: Tensor,
    options: LogitOptions,
    stats: tuple[str, ...] = STATS,
    scale: float = 1.0,
    kernels: Any = logit_rows,
) -> None:
    """Both functions as accurate as plain PyTorch on the same logits, and nothing written but what they say.

    The rounding step is that of the largest logit, twice in a row's results, which are differences of two; of coefficients it is that of
    the largest, and of the largest logit inside the exponential. As a whole they are held to the rule without the latter.
    """
    wants = truth(logits, targets, options, stats, scale)
    size = options.slope * float(logits[logits.isfinite()].abs().max())
    if options.softcap is not None:
        size = min(size, options.softcap / options.temperature)
    step, eps = size * torch.finfo(torch.float32).eps, torch.finfo(logits.dtype).eps
    torchs, ours, kept = logits.clone(), logits, logits.clone()
    others = plain.fold_with_gradient(torchs, targets, options, stats, scale)
    logps, found = kernels.fold(logits, targets, options, stats)
    assert torch.equal(logits, kept)
    again, again_found = kernels.fold_with_gradient(ours, targets, options, stats, scale)
    assert tuple(found) == tuple(again_found) == stats
    for got, same, plainly, want in (
        (logps, again, others[0], wants[0]),
        *((found[name], again_found[name], others[1][name], wants[1][name]) for name in stats),
    ):
        assert got.dtype == torch.float32
        assert_as_accurate(got, plainly, want, 2 * step)
        assert_as_accurate(same, plainly, want, 2 * step)
    gradient = wants[2]
    assert_as_accurate(ours, torchs, gradient, (eps + step) * float(gradient.abs().max()))
    assert (ours.double() - gradient).norm() <= 2 * (torchs.double() - gradient).norm() + eps * gradient.norm()
    if logits.stride(0) > logits.shape[1]:
        around = logits.as_strided((logits.shape[0], logits.stride(0)), (logits.stride(0), 1))[:, logits.shape[1] :]
        assert around.isnan().all()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_as_accurate_as_pytorch(dtype: torch.dtype, option: str) -> None:
    assert_rows(*make_rows(dtype=dtype, option=option), OPTIONS[option], scale=8.0 if dtype == torch.float16 else 1.0)


@pytest.mark.parametrize("width", [1, 5, 16, 32, 33])
def test_widths(width: int) -> None:
    """Less than a block, whole blocks, one column more."""
    assert_rows(*make_rows(width=width), OPTIONS["plain"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("shipped_blocks")
def test_blocks_as_shipped(dtype: torch.dtype) -> None:
    for stats in ((), STATS):
        assert_rows(*make_rows(3, 5001, dtype), OPTIONS["softcap"], stats)


def test_any_statistics() -> None:
    logits, targets = make_rows()
    logps, every = logit_rows.fold(logits, targets, OPTIONS["plain"], STATS)
    for count in range(4):
        for stats in itertools.combinations(reversed(STATS), count):
            got, found = logit_rows.fold(logits, targets, OPTIONS["plain"], stats)
            assert tuple(found) == stats
            torch.testing.assert_close([got, *found.values()], [logps, *(every[name] for name in stats)], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_target_that_is_all_but_certain(dtype: torch.dtype) -> None:
    """1 - p = 1e-6 and less: log-probability, entropy and gradient to full relative accuracy, whatever the size of the logits."""
    for level, gap in ((0.0, 18.0), (40.0, 20.0)):
        logits = torch.zeros(3, 37, device=DEVICE).to(dtype)
        logits[:, 1:] += torch.randint(-2, 3, (3, 36)).to(DEVICE)
        logits[:, 5] = gap
        logits += level
        targets = torch.full((3,), 5, device=DEVICE)
        stats = ("entropy", "max_logp")
        want, wanted, gradient = truth(logits, targets, OPTIONS["plain"], stats, 1024.0)
        logps, found = logit_rows.fold_with_gradient(logits, targets, OPTIONS["plain"], stats, 1024.0)
        assert (want.abs() < 1e-5).all()
        # float16 has fewer digits for the smallest coefficients.
        step = torch.finfo(torch.float32).eps
        for got, true in ((logps, want), *((found[name], wanted[name]) for name in stats)):
            assert ((got - true).abs() <= 16 * step * true.abs()).all()
        spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        error = (logits.double() - gradient).abs()
        assert (error <= (torch.finfo(dtype).eps / 2 + 16 * step) * gradient.abs() + spacing).all()


@pytest.mark.parametrize("option", ["plain", "softcap"])
def test_tokens_that_cannot_come(option: str) -> None:
    logits, targets = make_rows(6, option=option)
    targets[:] = 2
    logits[0, ::3] = float("-inf")
    logits[1, 16:] = float("-inf")  # whole blocks
    logits[2, :16] = float("-inf")
    targets[2] = 20
    logits[3, :] = float("-inf")  # all but the target
    logits[3, 2] = 1.0
    logits[4, :] = torch.finfo(torch.float32).min  # how others take tokens out
    logits[4, 2:4] = torch.tensor([1.0, 2.0])
    options = OPTIONS[option]
    barred = logits == float("-inf")
    assert_rows(logits, targets, options, ("entropy", "max_logp", "is_top1"))
    assert (logits[barred] == 0).all()
    if option == "plain":
        assert (logits[3] == 0).all()


def test_a_target_that_cannot_come() -> None:
    """Its log-probability is -inf, and the other statistics are those of the row."""
    logits, targets = make_rows(1)
    logits[0, 7] = float("-inf")
    targets[0] = 7
    _, want, gradient = truth(logits, targets, OPTIONS["plain"], ("entropy", "max_logp"), 1.0)
    logps, found = logit_rows.fold_with_gradient(logits, targets, OPTIONS["plain"], ("entropy", "max_logp"), 1.0)
    assert logps[0] == float("-inf")
    for name in want:
        torch.testing.assert_close(found[name].double(), want[name], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-6, atol=1e-6)


def test_large_logits() -> None:
    assert_rows(*make_rows(spread=1e4), OPTIONS["plain"])
    assert_rows(*make_rows(spread=1e4), OPTIONS["softcap"])


def test_ignored_rows_are_zero_whatever_they_hold() -> None:
    logits, targets = make_rows()
    targets[:] = -100
    logits[:] = float("nan")
    logps, found = logit_rows.fold_with_gradient(logits, targets, OPTIONS["plain"], STATS, 1.0)
    for tensor in (logps, *found.values(), logits):
        assert (tensor == 0).all()
    assert torch.equal(logit_rows.fold(logits[:0], targets[:0], OPTIONS["plain"], STATS)[0], logps[:0])


def test_nan_is_not_lost() -> None:
    """Neither one among the logits nor a target outside the vocabulary, which a GPU cannot be asked about beforehand."""
    for place in (0, 20, 36):
        logits, targets = make_rows(2)
        targets[:] = 20
        logits[0, place] = float("nan")
        logps, found = logit_rows.fold_with_gradient(logits, targets, OPTIONS["plain"], ("entropy", "max_logp"), 1.0)
        for tensor in (logps, *found.values()):
            assert tensor.isnan().tolist() == [True, False]
        assert logits[0].isnan().any() and not logits[1].isnan().any()
    for target in (-1, 37):
        logits, targets = make_rows(2)
        targets[:] = torch.tensor([target, 3])
        logps, _ = logit_rows.fold_with_gradient(logits, targets, OPTIONS["plain"], (), 1.0)
        assert logps.isnan().tolist() == [True, False] and logits[0].isnan().all() and not logits[1].isnan().any()


def test_rows_beyond_32_bit_offsets(tmp_path: Path) -> None:
    """The third row begins 2^31 elements after the first. On the CPU the file has no more blocks than are written to."""
    stride, width = 2**30 + 16, 37
    size = 2 * stride + width
    if DEVICE == "cuda":
        storage = torch.zeros(size, dtype=torch.float16, device=DEVICE)
    else:
        storage = torch.from_file(str(tmp_path / "logits"), shared=True, size=size, dtype=torch.float16)
    logits = storage.as_strided((3, width), (stride, 1))
    near, targets = make_rows(3, width, torch.float16)
    logits.copy_(near)
    found = [logit_rows.fold_with_gradient(rows, targets, OPTIONS["plain"], (), 1.0)[0] for rows in (logits, near)]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(logits, near)


def test_results_do_not_change_from_run_to_run() -> None:
    logits, targets = make_rows()
    pair = [logits.clone() for _ in range(2)]
    logps = [logit_rows.fold_with_gradient(one, targets, OPTIONS["plain"], (), 1.0)[0] for one in pair]
    assert torch.equal(*logps) and torch.equal(*pair)


class Broken:
    """Row kernels with one mistake."""

    def __init__(self, mistake: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        self.fold = logit_rows.fold
        self.mistake = mistake

    def fold_with_gradient(self, logits: Tensor, targets: Tensor, *rest: Any) -> Any:
        before = logits.clone()
        found = logit_rows.fold_with_gradient(logits, targets, *rest)
        self.mistake(logits, targets, before)
        return found


def forgets_the_last_column(logits: Tensor, targets: Tensor, before: Tensor) -> None:
    logits[:, -1] = before[:, -1]


def leaves_ignored_rows(logits: Tensor, targets: Tensor, before: Tensor) -> None:
    logits[targets == -100] = before[targets == -100]


def forgets_the_target(logits: Tensor, targets: Tensor, before: Tensor) -> None:
    logits[0, targets[0]] -= 1.0


@pytest.mark.parametrize("mistake", [forgets_the_last_column, leaves_ignored_rows, forgets_the_target])
def test_mistakes_are_caught(mistake: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    with pytest.raises(AssertionError):
        assert_rows(*make_rows(dtype=torch.bfloat16), OPTIONS["plain"], kernels=Broken(mistake))


def make_head(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, bias = (torch.randn(shape).to(DEVICE).to(dtype) for shape in ((rows, 16), (37, 16), (37,)))
    targets = torch.randint(0, 37, (rows,)).to(DEVICE)
    targets[1::4] = -100
    return hidden, weight, targets, bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 8])
def test_the_backend(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows a chunk, some with a gradient and some without: what the chunks of plain PyTorch give, in every function."""
    monkeypatch.setattr(row_chunks, "CHUNK_ELEMENTS", {DEVICE: 3 * 37})
    hidden, weight, targets, bias = make_head(rows, dtype)
    options, head, stats = OPTIONS["softcap"], (hidden, weight, targets, bias), ("entropy", "is_top1")
    results = []
    for module in (triton_backend, chunked):
        logps, found = module.forward(*head, options, stats)
        kept = module.empty_kept(hidden, weight)
        got, again, gradient = module.forward_with_gradient(*head, options, stats, rows // 2 + 1 if rows else 0, None)
        torch.testing.assert_close([got, *again.values()], [logps, *found.values()], rtol=1e-6, atol=1e-6)
        module.forward_with_gradient(*head, options, (), rows, kept)
        grads = module.backward(logps, *head, options, (True, True, True))
        grads_kept = module.backward_kept(logps, kept, hidden, weight, targets, options, (True, True, True))
        results.append([logps, *found.values(), gradient, *grads, *grads_kept])
    step = 4 * torch.finfo(dtype).eps
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32 and ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=step, atol=step * float(theirs.abs().max()) if theirs.numel() else 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backend_is_as_accurate_as_pytorch(dtype: torch.dtype) -> None:
    hidden, weight, targets, bias = make_head(12, dtype)
    options, up, needs = OPTIONS["plain"], torch.randn(12).to(DEVICE), (True, True, True)
    grads = triton_backend.backward(up, hidden, weight, targets, bias, options, needs)
    torchs = reference.backward(up, hidden, weight, targets, bias, options, needs)
    wide = [tensor.double() for tensor in (up, hidden, weight)]
    truths = reference.backward(*wide, targets, bias.double(), options, needs)
    for ours, theirs, want in zip(grads, torchs, truths, strict=True):
        assert ours is not None and theirs is not None and want is not None
        assert_accurate(ours.to(dtype), theirs.to(dtype), want)


@pytest.mark.parametrize("trained", [False, True])
def test_the_op(trained: bool) -> None:
    """A frozen head's gradient made in forward, a trained one's from what forward kept."""
    hidden, weight, targets, bias = make_head(8, torch.float32)
    up, results = torch.randn(8).to(DEVICE), []
    for backend in ("triton", "reference"):
        leaves = [tensor.clone().requires_grad_(place == 0 or trained) for place, tensor in enumerate((hidden, weight, bias))]
        found = linear_logprobs(
            leaves[0], leaves[1], targets, bias=leaves[2], softcap=4.0, temperature=0.8, stats=STATS, backend=backend
        )
        grads = torch.autograd.grad(found.logps, leaves if trained else leaves[:1], up)
        results.append([found.logps.detach(), *(getattr(found, name) for name in STATS), *grads])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_kernel_that_runs_here(dtype: torch.dtype, option: str) -> None:
    """On a GPU also those of the CUDA sources, with rows that one block and that several share."""
    runs = [(plain, 37), (logit_rows, 37)]
    if native_rows.unavailable_reason(DEVICE, dtype) is None:
        runs += [(native_rows, 37), (native_rows, 40003)]
    for kernels, width in runs:
        assert_rows(*make_rows(5, width, dtype, option), OPTIONS[option], kernels=kernels)


def test_the_sweep_tries_blocks_that_serve() -> None:
    """One of them is the one that ships, and all give the same."""
    subject = sweep_tiles.LogitRows(2, 9000, torch.device(DEVICE))
    subject.logits *= 4.0
    options, logits = OPTIONS["plain"], subject.logits.clone()
    want, _ = plain.fold(logits, subject.targets, options, ())
    for candidate in sweep_tiles.BLOCKS:
        subject.logits.copy_(logits)
        with subject.varied("rows_200", candidate):
            logps, _ = subject.one("rows_200")
        torch.testing.assert_close(logps, want, rtol=1e-6, atol=1e-5)
    assert sum(subject.described("rows_200", candidate)["in_table"] for candidate in sweep_tiles.BLOCKS) == 1


def test_blocks_of_a_sweep_are_taken_for_calls_as_it_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = logit_rows_tiles.block_of(torch.bfloat16, ())
    few, many = logit_rows_tiles.CANDIDATES[:2]
    strange = logit_rows_tiles.Block(16, 1, 1, 255)  # not known to compile
    times = [(200, shipped, 2.0), (200, few, 1.0), (200, strange, 0.5), (1024, shipped, 2.0), (1024, few, 3.0), (1024, many, 1.0)]
    rows = [
        {"pass": f"rows_{n}", "rows": n, **block._asdict(), "in_table": block == shipped, "milliseconds": took}
        for n, block, took in times
    ]
    (tmp_path / "tiles.json").write_text(json.dumps({"machine": {"gpu": "NVIDIA H100"}, "rows": rows}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    gpu = torch.device("cuda")
    assert measured_tiles.fastest_block(300, gpu) is None
    monkeypatch.setenv(measured.VARIABLE, str(tmp_path))
    assert [measured_tiles.fastest_block(n, gpu) for n in (60, 300, 700)] == [few, few, many]

    monkeypatch.setattr(measured_tiles, "fastest_block", lambda rows, device: few)
    monkeypatch.setattr(logit_rows_tiles, "_override", [])  # the other tests' small block

    def taken(
        dtype: torch.dtype = torch.bfloat16, stats: tuple[str, ...] = (), scale: float | None = 1.0, width: int = 64
    ) -> Any:
        logits = torch.zeros(3, width, dtype=dtype)
        launch, *_ = logit_rows._prepare(logits, torch.zeros(3, dtype=torch.int64), OPTIONS["plain"], stats, scale)
        return launch.constants["BLOCK"], launch.num_warps, launch.num_stages

    own = shipped.columns, shipped.num_warps, shipped.num_stages
    assert taken() == (few.columns, few.num_warps, few.num_stages) != own
    # Another dtype or statistics, no gradient, rows of no whole 16 elements.
    assert taken(scale=None) == taken(width=65) == taken(stats=("max_logp",)) == own
    assert taken(dtype=torch.float16) == own


def test_reasons() -> None:
    assert triton_backend.unavailable_reason(DEVICE, torch.bfloat16) is None
    assert "float64" in (triton_backend.unavailable_reason(DEVICE, torch.float64) or "")
