"""The CUDA kernels over rows of logits, run on the CPU by tests/support/cuda_emulation, against plain PyTorch and float64."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from emulated_cuda import Division, EmulatedNative, Weather
from torch import Tensor
from trees import assert_accurate

from mmdpo_kernels.backends.chunked import logit_rows as plain
from mmdpo_kernels.backends.logit_options import LogitOptions
from mmdpo_kernels.backends.native import logit_rows as native

STATS = native.STATS
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "plain": LogitOptions(None, 1.0, 1.0, -100),
    "softcap": LogitOptions(5.0, 1.0, 1.0, -100),
    "temperature": LogitOptions(None, 0.5, 0.7, -100),
    "negative": LogitOptions(None, -1.5, 1.0, -100),
    "all": LogitOptions(4.0, -1.5, 0.7, -1),
}
SUMS_BYTES, SYSTEM_BYTES = 320, 1024


class Found(NamedTuple):
    logps: Tensor
    stats: dict[str, Tensor]
    coefficients: Tensor | None


@pytest.fixture(scope="session")
def emulated() -> EmulatedNative:
    return EmulatedNative()


@pytest.fixture(params=Weather, ids=lambda weather: weather.name.lower())
def weather(request: pytest.FixtureRequest, emulated: EmulatedNative) -> Iterator[Weather]:
    emulated.set_weather(request.param)
    yield request.param
    emulated.set_weather(Weather.CALM)


def place_for(division: Division, logits: Tensor) -> native.Place:
    """A GPU whose shared memory makes `fold_with_gradient` divide the rows so."""
    capability = 8 if division.ranks == 1 else 9
    if not division.held:
        # Too little for a slice of any cluster; many multiprocessors or one decide how many blocks share a row.
        return native.Place(0, 1 if division.ranks == 1 else 10_000, capability, 1300)
    vectors = logits.shape[1] * logits.element_size() // 16
    half = SUMS_BYTES + -(-vectors // division.ranks) * 16 + SYSTEM_BYTES
    return native.Place(0, 1, capability, 2 * half)


def run(
    emulated: EmulatedNative,
    logits: Tensor,
    targets: Tensor,
    options: LogitOptions,
    place: native.Place,
    stats: tuple[str, ...] = STATS,
    scale: float | None = 2.0,
) -> Found:
    """With a scale `fold_with_gradient`, else `fold`."""
    module: ModuleType = emulated  # type: ignore[assignment]
    logits = logits.clone() if logits.is_contiguous() else logits
    before = logits.clone()
    found = Found(*native._run(module, logits, targets, options, stats, scale, place, 0), logits)
    if scale is None:
        assert torch.equal(logits.view(_BITS[logits.dtype]), before.view(_BITS[logits.dtype]))
        return found._replace(coefficients=None)
    return found


_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def expected(logits: Tensor, targets: Tensor, options: LogitOptions, dtype: torch.dtype, scale: float = 2.0) -> Found:
    logits = logits.to(dtype, copy=True)
    return Found(*plain.fold_with_gradient(logits, targets, options, STATS, scale), logits)


def check(emulated: EmulatedNative, logits: Tensor, targets: Tensor, options: LogitOptions, division: Division) -> None:
    place = place_for(division, logits)
    torch_same, truth = (expected(logits, targets, options, dtype) for dtype in (logits.dtype, torch.float64))
    found = run(emulated, logits, targets, options, place)
    assert emulated.division == division
    for ours in (found, run(emulated, logits, targets, options, place, scale=None)):
        assert_accurate(ours.logps, torch_same.logps, truth.logps)
        for name in STATS:
            assert ours.stats[name].dtype == torch.float32
            # A mean over tokens that cannot come is -inf.
            finite = truth.stats[name].isfinite()
            assert torch.equal(ours.stats[name][~finite].double(), truth.stats[name][~finite])
            assert_accurate(ours.stats[name][finite], torch_same.stats[name][finite], truth.stats[name][finite])
    assert found.coefficients is not None and torch_same.coefficients is not None and truth.coefficients is not None
    assert_accurate(found.coefficients, torch_same.coefficients, truth.coefficients)


def make_rows(vocabulary: int, dtype: torch.dtype, options: LogitOptions = OPTIONS["plain"]) -> tuple[Tensor, Tensor]:
    """An ordinary row, an ignored one, one with tokens that cannot come, a peaked one, and one far from 0."""
    logits, targets = 3 * torch.randn(5, vocabulary), torch.randint(0, vocabulary, (5,))
    targets[1] = options.ignore_index
    targets[2] = 1 % vocabulary
    logits[2, ::3] = float("-inf") if options.logit_scale > 0 else float("inf")
    logits[2, targets[2]] = 0.0
    logits[3, targets[3]] += 14 / options.logit_scale
    logits[4] += 100
    return logits.to(dtype), targets


DIVISIONS = {
    "block": (5003, Division(1, True)),
    "pair": (9001, Division(2, True)),
    "four": (9001, Division(4, True)),
    "eight": (20_011, Division(8, True)),
    "reread": (40_009, Division(1, False)),
    "reread by eight": (131_101, Division(8, False)),
}


@pytest.mark.parametrize("name", [name for name in DIVISIONS if name != "reread by eight"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_accurate_as_pytorch(emulated: EmulatedNative, weather: Weather, name: str, dtype: torch.dtype) -> None:
    vocabulary, division = DIVISIONS[name]
    check(emulated, *make_rows(vocabulary, dtype), OPTIONS["plain"], division)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_long_rows(emulated: EmulatedNative, weather: Weather, dtype: torch.dtype) -> None:
    vocabulary, division = DIVISIONS["reread by eight"]
    logits, targets = make_rows(vocabulary, dtype)
    check(emulated, logits[3:], targets[3:], OPTIONS["softcap"], division)


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 8, 9, 37, 800])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_logits(emulated: EmulatedNative, vocabulary: int, dtype: torch.dtype) -> None:
    """To a few rounding steps: of so few numbers plain PyTorch may hit each by luck."""
    for options in (OPTIONS["plain"], OPTIONS["all"]):
        logits, targets = make_rows(vocabulary, dtype, options)
        found = run(emulated, logits, targets, options, place_for(Division(1, True), logits))
        want = expected(logits, targets, options, torch.float64)
        assert found.coefficients is not None and want.coefficients is not None
        # A rounding step of a logit of 20 is one of 2e-6 of its exponential.
        rtol = torch.finfo(dtype).eps + 4e-6
        torch.testing.assert_close(found.coefficients.double(), want.coefficients, rtol=rtol, atol=1e-6)
        for ours, truth in ((found.logps, want.logps), *((found.stats[name], want.stats[name]) for name in STATS)):
            torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("division", [Division(1, True), Division(2, True), Division(1, False)], ids=["block", "pair", "reread"])
def test_options(emulated: EmulatedNative, option: str, dtype: torch.dtype, division: Division) -> None:
    options = OPTIONS[option]
    check(emulated, *make_rows(3001, dtype, options), options, division)


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("division", [Division(2, True), Division(8, True), Division(1, False)], ids=["pair", "eight", "reread"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_start_and_end_anywhere(emulated: EmulatedNative, offset: int, division: Division, dtype: torch.dtype) -> None:
    """Targets everywhere, too, and blocks of a cluster that get nothing; and what lies between rows stays as it is."""
    width, options, targets = 41, OPTIONS["plain"], torch.arange(offset % 4, 41, 4)
    around = torch.randn(len(targets), 65).to(dtype)
    inside = around[:, offset : offset + width]
    truth, before = expected(inside, targets, options, torch.float64), around.clone()
    found = run(emulated, inside, targets, options, place_for(division, inside))
    assert emulated.division == division
    torch.testing.assert_close(found.logps.double(), truth.logps, rtol=1e-6, atol=1e-6)
    assert found.coefficients is not None and truth.coefficients is not None
    torch.testing.assert_close(found.coefficients.double(), truth.coefficients, rtol=torch.finfo(dtype).eps + 4e-6, atol=1e-7)
    before[:, offset : offset + width] = inside
    assert torch.equal(around, before)


@pytest.mark.parametrize("division", [Division(1, True), Division(4, True), Division(1, False)], ids=["block", "four", "reread"])
def test_peaked_rows_keep_what_is_left(emulated: EmulatedNative, division: Division) -> None:
    """p(target) = 1 - 1e-6 and nearer: the gradient and the log-probability to full relative accuracy."""
    logits = torch.randn(3, 2003)
    targets = torch.tensor([0, 1000, 2002])
    logits[torch.arange(3), targets] = torch.tensor([22.0, 26.0, 40.0])
    truth = expected(logits, targets, OPTIONS["plain"], torch.float64)
    found = run(emulated, logits, targets, OPTIONS["plain"], place_for(division, logits))
    assert (truth.logps > -1e-5).all()
    assert found.coefficients is not None and truth.coefficients is not None
    torch.testing.assert_close(found.coefficients.double(), truth.coefficients, rtol=1e-5, atol=0)
    others = logits.double().scatter(1, targets[:, None], float("-inf")).logsumexp(-1)
    exact = -torch.log1p((others - logits.double().gather(1, targets[:, None])[:, 0]).exp())
    torch.testing.assert_close(found.logps.double(), exact, rtol=1e-5, atol=0)
    assert (found.stats["is_top1"] == 1).all() and torch.equal(found.stats["max_logp"], found.logps)
    assert (found.stats["entropy"] > 0).all()


@pytest.mark.parametrize("division", [Division(1, True), Division(4, True), Division(1, False)], ids=["block", "four", "reread"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_do_not_change_what_else_is_found(emulated: EmulatedNative, division: Division, dtype: torch.dtype) -> None:
    logits, targets = make_rows(2003, dtype)
    place = place_for(division, logits)
    want = run(emulated, logits, targets, OPTIONS["plain"], place)
    for stats in ((), *((name,) for name in STATS), ("mean_logit", "max_logp")):
        for scale in (None, 2.0):
            found = run(emulated, logits, targets, OPTIONS["plain"], place, stats, scale)
            assert set(found.stats) == set(stats)
            assert scale is None or torch.equal(found.coefficients, want.coefficients)  # type: ignore[arg-type]
            if scale is not None:
                assert torch.equal(found.logps, want.logps)
                assert all(torch.equal(found.stats[name], want.stats[name]) for name in stats)


@pytest.mark.parametrize("division", [Division(1, True), Division(4, True), Division(1, False)], ids=["block", "four", "reread"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ignored_rows_are_not_read(emulated: EmulatedNative, division: Division, dtype: torch.dtype) -> None:
    logits, targets = torch.full((3, 2003), float("nan"), dtype=dtype), torch.full((3,), -100)
    for scale in (None, 2.0):
        found = run(emulated, logits, targets, OPTIONS["plain"], place_for(division, logits), scale=scale)
        assert all((result == 0).all() for result in (found.logps, *found.stats.values()))
        assert scale is None or (found.coefficients == 0).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("division", [Division(1, True), Division(2, True), Division(1, False)], ids=["block", "pair", "reread"])
@pytest.mark.parametrize("option", ["plain", "negative"])
def test_what_is_not_finite_stays_in_its_row(emulated: EmulatedNative, division: Division, option: str) -> None:
    options = OPTIONS[option]
    masked = float("-inf") if option == "plain" else float("inf")
    logits, targets = torch.randn(6, 2003), torch.tensor([5, 2002, 7, 0, -3, 2003])
    logits[0, 5] = masked  # the target cannot come
    logits[1, 77] = float("nan")
    logits[2] = masked  # nothing can come
    logits[3, :1999] = masked
    logits[3, 0] = 0.0
    want = expected(logits[:4], targets[:4], options, torch.float64)
    found = run(emulated, logits, targets, options, place_for(division, logits))
    assert found.coefficients is not None and want.coefficients is not None
    assert found.logps[0] == float("-inf") and not found.coefficients[0].isnan().any()
    assert found.stats["entropy"][0].isfinite() and found.stats["max_logp"][0].isfinite()
    torch.testing.assert_close(found.coefficients[[0, 3]].double(), want.coefficients[[0, 3]], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found.logps[3].double(), want.logps[3])
    torch.testing.assert_close(found.stats["entropy"][3].double(), want.stats["entropy"][3])
    # NaN among the logits, nothing possible, targets out of range.
    for row in (1, 2, 4, 5):
        assert found.logps[row].isnan() and found.stats["entropy"][row].isnan() and found.coefficients[row].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_division_changes_rounding_only(emulated: EmulatedNative, dtype: torch.dtype) -> None:
    logits, targets = make_rows(4099, dtype)
    places = [place_for(Division(ranks, True), logits) for ranks in (1, 2, 4, 8)]
    first, *rest = (run(emulated, logits, targets, OPTIONS["plain"], place) for place in places)
    for found, place in zip(rest, places[1:], strict=True):
        torch.testing.assert_close(found.logps, first.logps, rtol=1e-6, atol=1e-6)
        again = run(emulated, logits, targets, OPTIONS["plain"], place)
        assert all(
            torch.equal(a, b)
            for a, b in zip((found.logps, *found.stats.values()), (again.logps, *again.stats.values()), strict=True)
        )
        assert torch.equal(found.coefficients, again.coefficients)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "vocabulary", "dtype", "place", "gradient", "held"),
    [
        # H100
        (2048, 152_064, torch.bfloat16, (0, 132, 9, 233_472), 1, Division(4, True)),
        (256, 152_064, torch.bfloat16, (0, 132, 9, 233_472), 8, Division(8, True)),
        (2048, 152_064, torch.float32, (0, 132, 9, 233_472), 1, Division(8, True)),
        (2048, 32_064, torch.bfloat16, (0, 132, 9, 233_472), 1, Division(1, True)),
        (2048, 1_000_000, torch.float32, (0, 132, 9, 233_472), 1, Division(1, False)),
        # A100, which has no clusters
        (2048, 152_064, torch.bfloat16, (0, 108, 8, 167_936), 1, Division(1, False)),
        (2048, 32_064, torch.bfloat16, (0, 108, 8, 167_936), 1, Division(1, True)),
    ],
)
def test_division_of_rows(
    emulated: EmulatedNative,
    rows: int,
    vocabulary: int,
    dtype: torch.dtype,
    place: tuple[int, int, int, int],
    gradient: int,
    held: Division,
) -> None:
    assert emulated.logit_rows_division((rows, vocabulary, vocabulary), dtype, False, place) == Division(gradient, False)
    assert emulated.logit_rows_division((rows, vocabulary, vocabulary), dtype, True, place) == held


def test_no_rows(emulated: EmulatedNative) -> None:
    found = run(emulated, torch.empty(0, 37), torch.empty(0, dtype=torch.int64), OPTIONS["plain"], native.Place(0, 1, 9, 10_000))
    assert found.logps.shape == (0,) and all(stat.shape == (0,) for stat in found.stats.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 9, dtype=torch.float64)}, "no float64"),
        ({"logits": torch.zeros(9).expand(2, 9)}, "must not overlap"),
        ({"options": OPTIONS["plain"]._replace(temperature=0.0)}, "temperature must be positive"),
        ({"options": OPTIONS["plain"]._replace(softcap=-1.0)}, "softcap must be positive"),
        ({"place": native.Place(0, 0, 9, 10_000)}, "multiprocessors"),
    ],
)
def test_errors_name_the_argument(emulated: EmulatedNative, change: dict[str, Any], message: str) -> None:
    call = {"logits": torch.zeros(2, 9), "options": OPTIONS["plain"], "place": native.Place(0, 1, 9, 10_000), **change}
    module: ModuleType = emulated  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=message):
        native._run(module, call["logits"], torch.zeros(2, dtype=torch.int64), call["options"], (), 1.0, call["place"], 0)


def test_unavailable_reasons() -> None:
    assert "cuda tensors" in (native.unavailable_reason("cpu", torch.float32) or "")
    assert "float32, bfloat16 and float16" in (native.unavailable_reason("cuda", torch.float64) or "")


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("write_to_a_rank_that_may_not_run", "before the cluster's first barrier"),
        ("write_to_a_rank_that_is_not_there", "no block 2"),
        ("write_to_a_rank_that_has_ended", "a block that has ended"),
        ("write_past_shared_memory_of_a_rank", "outside of the arrays"),
        ("arrive_alone", "wait forever in cluster_wait"),
        ("wait_without_arriving", "cluster_wait without cluster_arrive"),
        ("end_without_waiting", "between cluster_arrive and cluster_wait"),
    ],
)
def test_the_emulation_finds_faults_of_clusters(emulated: EmulatedNative, kernel: str, message: str) -> None:
    emulated.set_weather(Weather.ROUGH)
    try:
        assert message in emulated.fault(kernel)
    finally:
        emulated.set_weather(Weather.CALM)
