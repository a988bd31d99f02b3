"""attention_mass in Triton against the reference: compiled where there is a GPU, else interpreted, hence few and small sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from devices import DEVICE
from torch import Tensor
from trees import random_tree_end, with_reach

from mmdpo_kernels import attention_mass
from mmdpo_kernels.backends.calls import AttentionMassCall
from mmdpo_kernels.backends.reference import attention_mass as reference
from mmdpo_kernels.backends.reference.scores import capped_scores
from mmdpo_kernels.backends.triton import attention_mass as triton_backend
from mmdpo_kernels.tree_mask import visible_rows

REDUCTIONS = (None, "mean", "tokens")
OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, "softcap": {"softcap": 1.5}, "window": {"window": 9}}


@dataclass
class Sizes:
    B: int
    Hq: int
    Hkv: int
    R: int
    S: int
    D: int


SMALL = Sizes(1, 2, 1, 3, 20, 12)  # two float32 key blocks, the last not full; a head dim that is padded
ODD = Sizes(2, 6, 2, 6, 20, 12)  # a second row tile in the gradients, two of everything else
SIZES = {
    "one": Sizes(1, 1, 1, 1, 1, 1),
    "odd": ODD,
    "edge": Sizes(1, 4, 1, 8, 32, 16),  # whole row tiles and key blocks
    "wide": Sizes(1, 1, 1, 2, 20, 40),  # float32 head vectors are read in two steps
}


@dataclass
class Call:
    query_rows: Tensor
    key: Tensor
    segments: Tensor
    row_positions: Tensor
    num_segments: int
    tree_end: Tensor | None
    options: dict[str, Any]
    lse: Tensor | None = None
    reach: Tensor | None = None

    def arguments(self, reduce: str | None, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
        query_rows, key = (t if dtype is None else t.to(dtype) for t in (self.query_rows, self.key))
        options = (key.shape[-1] ** -0.5, self.options.get("softcap"), self.options.get("window"))
        known = (self.segments, self.row_positions, self.num_segments, self.tree_end, self.lse)
        return query_rows, key, AttentionMassCall(*known, *options, reduce, self.reach)

    def forward(self, module: Any, reduce: str | None, dtype: torch.dtype | None = None) -> Tensor:
        return module.forward(*self.arguments(reduce, dtype))

    def backward(self, grad: Tensor, module: Any, reduce: str | None, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        return module.backward(grad, *self.arguments(reduce, dtype))


def make_call(
    sizes: Sizes,
    option: str = "plain",
    *,
    dtype: torch.dtype = torch.float32,
    tree: bool = True,
    lse: bool = False,
    count: int = 3,
    reach: str | None = None,
) -> Call:
    """Strided query and key, keys in no segment, one row in three unused. reach: a kind of `trees.with_reach`."""
    query = torch.randn(sizes.B, sizes.R, sizes.Hq, sizes.D, device=DEVICE).to(dtype).transpose(1, 2)
    key = torch.randn(sizes.B, sizes.S, sizes.Hkv, 2 * sizes.D, device=DEVICE).to(dtype)[..., : sizes.D].transpose(1, 2)
    segments = torch.randint(-1, count, (sizes.B, sizes.S), device=DEVICE)
    rows = torch.randint(0, sizes.S, (sizes.B, sizes.R), device=DEVICE)
    rows[:, 1::3] = -1
    rows[:, 0] = sizes.S - 1
    tree_end = random_tree_end(sizes.B, sizes.S, seed=sizes.S, padding=False).to(DEVICE) if tree else None
    call = Call(query, key, segments, rows, count, tree_end, OPTIONS[option])
    if reach is not None:
        ends = torch.full((sizes.B, sizes.S), sizes.S) if tree_end is None else tree_end.cpu()
        ends, reaches = (each.to(DEVICE) for each in with_reach(ends, sizes.S, kind=reach))
        call = replace(call, tree_end=ends if tree else None, reach=reaches)
    return replace(call, lse=true_lse(call)) if lse else call


def true_scores(call: Call) -> Tensor:
    """(B, Hq, R, S) float64, -inf where not visible."""
    options = call.options
    scores = capped_scores(call.query_rows.double(), call.key.double(), call.key.shape[-1] ** -0.5, options.get("softcap"))
    tree_end = call.tree_end if call.tree_end is not None else torch.full_like(call.segments, call.segments.shape[1])
    seen = visible_rows(call.row_positions, tree_end, options.get("window"), call.reach)[:, None]
    return scores.masked_fill(~seen, float("-inf"))


def true_lse(call: Call) -> Tensor:
    """-inf in unused rows."""
    return true_scores(call).logsumexp(-1).float()


def assert_as_accurate(call: Call, ours: Tensor, torchs: Tensor, truth: Tensor) -> None:
    """|truth - ours| <= 2 |truth - torch| + one rounding step, elementwise and, without the score's, for the whole tensor.

    The step is that of the largest entry, and those of score and log-sum-exp inside the exponential, which move a probability by
    `eps * |score|` and `eps * |lse|`. PyTorch's softmax has no log-sum-exp; a backward is given the forward's, in float32.
    """
    assert ours.dtype == torchs.dtype and ours.shape == torchs.shape and not ours.isnan().any()
    scores, eps = true_scores(call), torch.finfo(ours.dtype).eps
    error, allowed = (found.double() - truth for found in (ours, torchs))
    score, lse = (float(each[each.isfinite()].abs().max()) for each in (scores, scores.logsumexp(-1)))
    excess = (error.abs() - 2 * allowed.abs() - eps * (1 + score + lse) * truth.abs().max()).max()
    assert excess <= 0, f"beyond the bound by {excess:.2e}"
    assert error.norm() <= 2 * allowed.norm() + eps * (1 + lse) * truth.norm()


def assert_forward(call: Call, reduce: str | None) -> None:
    got = call.forward(triton_backend, reduce)
    assert got.dtype == torch.float32
    assert_as_accurate(call, got, call.forward(reference, reduce), call.forward(reference, reduce, torch.float64))


def assert_backward(call: Call, reduce: str | None) -> None:
    out = call.forward(reference, reduce)
    grad = torch.randn(*out.shape, 2, device=DEVICE)[..., 0]  # its last stride is not 1
    truths = call.backward(grad.double(), reference, reduce, torch.float64)
    torchs = call.backward(grad, reference, reduce)
    for tensors in zip(call.backward(grad, triton_backend, reduce), torchs, truths, strict=True):
        assert_as_accurate(call, *tensors)


@pytest.fixture(autouse=True)
def outputs_start_as_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("tree", [True, False])
def test_forward_is_as_accurate_as_pytorch(option: str, reduce: str | None, tree: bool) -> None:
    # 17 segments take a second round; "tokens" knows no segments.
    for lse, count in ((False, 1), (False, 17), (True, 3), (True, 17)) if reduce != "tokens" else ((False, 3), (True, 3)):
        assert_forward(make_call(SMALL, option, tree=tree, lse=lse, count=count), reduce)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str, reduce: str | None) -> None:
    call = make_call(SIZES[name])
    assert_forward(call, reduce)
    if reduce == "mean" or name == "odd":
        assert_backward(call, reduce)


def test_more_blocks_than_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and rows are listed SCAN blocks at a time; of these the tree and the segments leave out some in the middle."""
    monkeypatch.setattr(triton_backend, "_processors", lambda device: 1)
    call = make_call(Sizes(1, 1, 1, 2, 290, 4))  # 19 float32 key blocks
    call.tree_end = torch.full((1, 290), 290, dtype=torch.int32, device=DEVICE)
    call.tree_end[:, 40:280] = 280
    call.row_positions[0, 0] = 289
    assert_forward(call, "mean")
    call.segments[:, 5:] = -1
    call.segments[:, 285:] = 2
    assert_forward(replace(call, lse=true_lse(call)), None)
    assert_backward(make_call(Sizes(1, 1, 1, 270, 4, 4), tree=False), "mean")  # 17 row tiles, mostly rows that see all


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype: torch.dtype, reduce: str | None) -> None:
    call = make_call(replace(SMALL, S=70), dtype=dtype, lse=dtype == torch.float16)
    assert_forward(call, reduce)
    assert_backward(call, reduce)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_backward(option: str, reduce: str | None) -> None:
    for lse, tree in ((False, True), (True, False)) if option == "plain" else ((False, True),):
        assert_backward(make_call(SMALL, option, lse=lse, tree=tree, count=17), reduce)


# Three float32 key blocks; the group's rows fill more than one tile of the gradients.
ACROSS = Sizes(1, 4, 2, 6, 40, 12)


@pytest.mark.parametrize("kind", ["pictures", "prefix"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_reach(option: str, reduce: str | None, kind: str) -> None:
    lse, tree = kind == "prefix", kind == "pictures" or option == "window"
    call = make_call(ACROSS, option, reach=kind, lse=lse, tree=tree, count=17)
    assert call.reach is not None and (call.reach > torch.arange(1, ACROSS.S + 1, device=DEVICE)).any()
    assert_forward(call, reduce)
    assert_backward(call, reduce)


def test_blocks_beyond_every_reach_are_not_read() -> None:
    """A NaN there would show: it is multiplied by zero probabilities in the gradient of the query."""
    call = make_call(replace(ACROSS, S=64))
    index = torch.arange(64, device=DEVICE)
    call.tree_end = torch.full((1, 64), 64, dtype=torch.int32, device=DEVICE)
    call.reach = torch.where(index < 24, 24, index + 1)[None].int()
    call.row_positions = torch.tensor([[3, 10, 15, 16, 20, 23]], device=DEVICE)
    grad = torch.randn(1, 3, device=DEVICE)
    want = call.backward(grad, triton_backend, "mean")
    call.key[:, :, 32:] = float("nan")
    got = call.backward(grad, triton_backend, "mean")
    assert torch.equal(got[0], want[0]) and torch.equal(got[1][:, :, :32], want[1][:, :, :32])
    call.reach[0, 3] = 33
    assert call.backward(grad, triton_backend, "mean")[0].isnan().any()


@pytest.mark.parametrize("lse", [False, True])
def test_keys_in_one_part(lse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows fill the device, keys are not split, and with lse nothing is left to combine."""
    monkeypatch.setattr(triton_backend, "_processors", lambda device: 1)
    call = make_call(SMALL, lse=lse, count=17)
    for reduce in REDUCTIONS:
        assert_forward(call, reduce)
    assert_backward(call, None)


def test_launches() -> None:
    """What the module's description says; every launch costs about as much as the work of a small call."""
    for lse, processors, want in ((False, 132, (2, 3, 3, 4)), (True, 132, (2, 2, 2, 4)), (True, 1, (1, 2, 2, 3))):
        call = make_call(replace(SMALL, B=2), lse=lse)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_backend, "_processors", lambda device, processors=processors: processors)
            counts = []
            for reduce in REDUCTIONS:
                work = triton_backend._Work.of(*call.arguments(reduce))
                out = work.forward()
                counts.append(len(work.launches))
            work.launches.clear()
            work.backward(out)
        assert (*counts, len(work.launches)) == want


def test_the_op_differentiates_each_subset_of_its_inputs() -> None:
    call = make_call(SMALL)
    found = []
    for backend, wanted in itertools.product(("triton", "reference"), ((True, False), (False, True), (True, True))):
        inputs = [t.detach().clone().requires_grad_(w) for t, w in zip((call.query_rows, call.key), wanted, strict=True)]
        mass = attention_mass(
            inputs[0],
            inputs[1],
            call.segments,
            row_positions=call.row_positions,
            num_segments=3,
            tree_end=call.tree_end,
            backend=backend,
        )
        # Its gradient is one number expanded over the result.
        found.append(torch.autograd.grad((mass * torch.arange(3, device=DEVICE)).sum(), [t for t in inputs if t.requires_grad]))
    for ours, want in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lse", [False, True])
def test_rows_that_see_nothing_and_unused_rows_are_zero(lse: bool) -> None:
    call = make_call(SMALL)
    call.tree_end = torch.arange(SMALL.S, dtype=torch.int32, device=DEVICE).expand(SMALL.B, -1)
    call.lse = torch.full((SMALL.B, SMALL.Hq, SMALL.R), float("-inf"), device=DEVICE) if lse else None
    for reduce in REDUCTIONS:
        assert (call.forward(triton_backend, reduce) == 0).all()
    assert all((grad == 0).all() for grad in call.backward(torch.ones(1, 3, device=DEVICE), triton_backend, "mean"))
    call = make_call(replace(SMALL, B=2))
    call.row_positions[1] = -1
    assert all((call.forward(triton_backend, reduce)[1] == 0).all() for reduce in REDUCTIONS)


def test_no_segments_and_no_rows() -> None:
    call = replace(make_call(SMALL), num_segments=0)
    call.segments.fill_(-1)
    assert call.forward(triton_backend, None).shape == (1, 2, 3, 0)
    assert_forward(call, "tokens")
    empty = replace(call, query_rows=call.query_rows[:, :, :0], row_positions=call.row_positions[:, :0], num_segments=4)
    assert empty.forward(triton_backend, None).shape == (1, 2, 0, 4)
    assert (empty.forward(triton_backend, "mean") == 0).all()


@pytest.mark.parametrize("lse", [False, True])
def test_nan_is_neither_lost_nor_spread(lse: bool) -> None:
    """Keys that no row sees and unused rows may hold anything; a visible NaN shows where it does in the reference."""
    call = make_call(replace(SMALL, S=37), tree=False, lse=lse)
    call.row_positions = torch.tensor([[20, -1, 30]], device=DEVICE)
    call.segments[0, 10] = 0
    call.query_rows[:, :, 1] = float("nan")
    call.key[:, :, 31:] = float("nan")
    assert not call.forward(triton_backend, None).isnan().any()
    call.key[:, :, 10] = float("nan")
    for reduce in REDUCTIONS:
        want = call.forward(reference, reduce).isnan()
        got = call.forward(triton_backend, reduce).isnan()
        assert want.any() and torch.equal(got.any(-1), want.any(-1))


def test_results_do_not_change_from_run_to_run() -> None:
    call = make_call(SMALL)
    results = [[call.forward(triton_backend, reduce) for reduce in REDUCTIONS] for _ in range(2)]
    grads = [call.backward(results[0][1], triton_backend, "mean") for _ in range(2)]
    for pair in (*zip(*results, strict=True), *zip(*grads, strict=True)):
        assert torch.equal(*pair)


def test_reasons() -> None:
    assert triton_backend.unavailable_reason(DEVICE, torch.bfloat16, softcap=True, tree_window=True) is None
    assert "float64" in (triton_backend.unavailable_reason(DEVICE, torch.float64) or "")
