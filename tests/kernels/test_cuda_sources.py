"""The CUDA half of csrc/ without a GPU: run on the CPU by support/cuda_emulation against the reference, compiled by nvcc for every target."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from emulated_cuda import EmulatedNative, Weather
from mass_cases import REDUCTIONS, Call, Sizes, assert_sums_as_accurate, make_call
from setup_functions import setup_functions
from torch import Tensor

from mmdpo_kernels.backends.calls import AttentionMassCall
from mmdpo_kernels.backends.native import attention_mass as native
from mmdpo_kernels.backends.reference import attention_mass as reference

ROOT = Path(__file__).resolve().parents[2]

SIZES = {
    "one": Sizes(1, 1, 1, 1, 1, 8),
    "odd": Sizes(2, 6, 2, 5, 67, 32),  # a second tile of 3 keys, a row tile that is not full
    "edge": Sizes(1, 8, 1, 8, 128, 64),  # whole tiles of rows and keys
    "rows": Sizes(1, 4, 2, 50, 203, 80),  # two row tiles; a head size that is no power of 2
    "deep": Sizes(2, 4, 4, 3, 150, 128),  # no groups
    "wide": Sizes(1, 3, 1, 4, 97, 256),  # several slabs
    "narrow": Sizes(1, 2, 1, 3, 70, 72),  # the head vector ends inside a step of 16
}
OPTIONS = {"plain": {}, "softcap": {"softcap": 5.0}, "window": {"window": 20}}
# A GPU that gets one chunk for all keys, and one that gets a chunk for each tile.
FEW, MANY = 1, 10_000


class OnGpu:
    """A backend like `native`, with the CUDA path emulated. `out` starts as NaN there."""

    def __init__(self, emulated: EmulatedNative, multiprocessors: int = MANY) -> None:
        self.emulated, self.multiprocessors = emulated, multiprocessors

    def forward(self, query_rows: Tensor, key: Tensor, call: AttentionMassCall) -> Tensor:
        module: ModuleType = self.emulated  # type: ignore[assignment]
        given = native._Given(module, query_rows, key, call)
        batch, heads, rows, _ = query_rows.shape
        count = call.num_segments
        shape = {None: (batch, heads, rows, count), "mean": (batch, count), "tokens": call.segments.shape}[call.reduce]
        out = torch.empty(shape)
        self.emulated.attention_mass_cuda(given.args, multiprocessors=self.multiprocessors, out=out.data_ptr())
        return out


@pytest.fixture(scope="session")
def emulated() -> EmulatedNative:
    return EmulatedNative()


@pytest.fixture(params=Weather, ids=lambda weather: weather.name.lower())
def weather(request: pytest.FixtureRequest, emulated: EmulatedNative) -> Iterator[Weather]:
    emulated.set_weather(request.param)
    yield request.param
    emulated.set_weather(Weather.CALM)


def check(call: Call, emulated: EmulatedNative, multiprocessors: int = MANY) -> None:
    largest = call.largest_score()
    for reduce in REDUCTIONS:
        truth = call.run(reference, reduce, torch.float64)
        assert_sums_as_accurate(call.run(OnGpu(emulated, multiprocessors), reduce), call.run(reference, reduce), truth, largest)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_accurate_as_pytorch(emulated: EmulatedNative, weather: Weather, size: str, lse: bool, dtype: torch.dtype) -> None:
    check(make_call(SIZES[size], dtype, {}, tree=weather is Weather.ROUGH, lse=lse), emulated)


@pytest.mark.parametrize("option", ["softcap", "window"])
@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options(emulated: EmulatedNative, option: str, tree: bool, dtype: torch.dtype) -> None:
    for lse in (False, True):
        check(make_call(SIZES["rows"], dtype, OPTIONS[option], tree, lse), emulated)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reach(emulated: EmulatedNative, weather: Weather, option: str, tree: bool, dtype: torch.dtype) -> None:
    """Pictures that begin in one tile of keys and end in another; hidden tokens have a reach too."""
    for lse, multiprocessors in ((False, MANY), (True, FEW)):
        call = make_call(SIZES["rows"], dtype, OPTIONS[option], tree, lse, reach=True)
        check(call, emulated, multiprocessors)


def test_reach_of_a_prefix(emulated: EmulatedNative) -> None:
    """Tiles after all rows of a block that all of them see, in a prefix-LM of two roots; tiles that the shorter prefix leaves out."""
    for lse in (False, True):
        call = make_call(Sizes(1, 2, 1, 30, 330, 16), torch.bfloat16, {}, tree=False)
        call.row_positions = torch.randint(0, 10, (1, 30))
        index = torch.arange(330)
        call.tree_end = torch.where(index < 200, 200, 330)[None].int()
        call.reach = torch.where(index < 140, 140, index + 1)[None].int()
        call.lse = call.scores().logsumexp(-1).float() if lse else None
        check(call, emulated)
        call.key = call.key.clone()
        call.key[:, :, 140:] = float("nan")
        assert not call.run(OnGpu(emulated), "tokens").isnan().any()


@pytest.mark.parametrize("num_segments", [1, 3, 17, 32])
@pytest.mark.parametrize("multiprocessors", [FEW, MANY])
def test_segments_in_any_number_and_order(emulated: EmulatedNative, num_segments: int, multiprocessors: int) -> None:
    for lse in (False, True):
        call = make_call(SIZES["rows"], torch.bfloat16, {}, lse=lse)
        call.num_segments = num_segments
        call.segments = torch.randint(-1, num_segments, call.segments.shape)
        call.segments[:, 64:128] = num_segments - 1  # a tile of one segment
        check(call, emulated, multiprocessors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_long_chunks_hold_many_tiles(emulated: EmulatedNative, weather: Weather, dtype: torch.dtype) -> None:
    """600 keys are two chunks of at most 512, tiles of one row are hidden, computed in part and in whole."""
    for lse in (False, True):
        check(make_call(Sizes(1, 2, 1, 3, 600, 16), dtype, {}, lse=lse), emulated, FEW)


def test_the_last_block_to_finish_sums_up(emulated: EmulatedNative, weather: Weather) -> None:
    """300 rows of a batch entry are three slices."""
    check(make_call(Sizes(2, 6, 2, 50, 40, 8), torch.bfloat16, {}), emulated)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("lse", [False, True])
def test_rows_that_see_nothing_and_unused_rows_are_zero(emulated: EmulatedNative, reduce: str | None, lse: bool) -> None:
    gpu = OnGpu(emulated)
    call = make_call(SIZES["odd"], torch.bfloat16, {})
    call.tree_end = torch.arange(67, dtype=torch.int32).repeat(2, 1)
    call.lse = torch.full((2, 6, 5), float("-inf")) if lse else None
    assert (call.run(gpu, reduce) == 0).all()
    call = make_call(SIZES["odd"], torch.bfloat16, {}, lse=lse)
    call.row_positions[1] = -1
    call.query_rows[1] = float("nan")
    assert (call.run(gpu, reduce)[1] == 0).all()
    assert (call.run(gpu, reduce)[0] != 0).any()


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_values_out_of_range_count_as_none(emulated: EmulatedNative, reduce: str | None) -> None:
    call = make_call(SIZES["odd"], torch.bfloat16, {"window": 9})
    call.segments[0, :20] = -1
    call.row_positions[0, 2] = -1
    want = call.run(OnGpu(emulated), reduce)
    call.segments[0, :10], call.segments[0, 10:20] = 4, -7
    call.row_positions[0, 2] = 2**30
    assert torch.equal(call.run(OnGpu(emulated), reduce), want)
    call.tree_end = torch.full((2, 67), 67, dtype=torch.int32)
    call.reach = torch.full((2, 67), 67, dtype=torch.int32)
    want = call.run(OnGpu(emulated), reduce)
    call.reach[:] = 2**30
    assert torch.equal(call.run(OnGpu(emulated), reduce), want)
    call.reach[:] = -(2**30)
    assert (call.run(OnGpu(emulated), reduce) == 0).all()


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_invisible_keys_leave_no_trace(emulated: EmulatedNative, reduce: str | None) -> None:
    call = make_call(SIZES["odd"], torch.float16, {}, tree=False)
    call.tree_end = torch.full((2, 67), 67, dtype=torch.int32)
    call.tree_end[:, 40:50] = torch.arange(40, 50, dtype=torch.int32)
    want = call.run(OnGpu(emulated), reduce)
    call.key = call.key.clone()
    call.key[:, :, 40:50] = float("nan")
    assert torch.equal(call.run(OnGpu(emulated), reduce), want)
    call.key[0, :, 0] = float("nan")
    assert call.run(OnGpu(emulated), reduce)[0].isnan().any()


@pytest.mark.parametrize("lse", [False, True])
def test_a_row_of_nan_is_nan(emulated: EmulatedNative, lse: bool) -> None:
    call = make_call(SIZES["odd"], torch.bfloat16, {}, tree=False, lse=lse)
    call.row_positions[0] = torch.tensor([66, 60, 50, 40, 66])
    call.query_rows = call.query_rows.clone()
    call.query_rows[0, 1, 2] = float("nan")
    mass = call.run(OnGpu(emulated), None)
    assert mass[0, 1, 2].isnan().all() and mass.isnan().sum() == call.num_segments


def test_no_segments_and_no_rows(emulated: EmulatedNative) -> None:
    gpu = OnGpu(emulated)
    call = make_call(SIZES["odd"], torch.float32, {})
    call.segments.fill_(-1)
    call.num_segments = 0
    assert call.run(gpu, None).shape == (2, 6, 5, 0)
    torch.testing.assert_close(call.run(gpu, "tokens"), call.run(reference, "tokens"))
    call.query_rows, call.row_positions, call.num_segments = call.query_rows[:, :, :0], call.row_positions[:, :0], 4
    assert call.run(gpu, None).shape == (2, 6, 0, 4)
    assert (call.run(gpu, "mean") == 0).all()


def test_a_chunk_more_or_less_changes_rounding_only(emulated: EmulatedNative) -> None:
    call = make_call(SIZES["rows"], torch.bfloat16, {})
    for reduce in REDUCTIONS:
        few, many = (call.run(OnGpu(emulated, count), reduce) for count in (FEW, MANY))
        torch.testing.assert_close(few, many, rtol=1e-6, atol=1e-8)
        assert torch.equal(many, call.run(OnGpu(emulated), reduce))


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("key", lambda call: torch.randn(2, 2, 67, 20).bfloat16()[..., :16], "key strides must be multiples of 16 bytes"),
        ("segments", lambda call: call.segments, "at most 32 segments, got 33"),
    ],
)
def test_errors_name_the_argument(emulated: EmulatedNative, argument: str, value: object, message: str) -> None:
    call = make_call(SIZES["odd"], torch.bfloat16, {})
    call.query_rows = call.query_rows[..., :16]
    call.key = call.key[..., :16]
    call.num_segments = 33 if argument == "segments" else 4
    setattr(call, argument, value(call))  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=message):
        call.run(OnGpu(emulated), None)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("read_past_the_end", "outside of the arrays"),
        ("write_past_shared_memory", "outside of the arrays"),
        ("copy_without_waiting", "copies under way"),
        ("wait_alone", "wait forever in __syncthreads"),
        ("part_of_a_warp", "wait forever in __ballot_sync"),
        ("different_instructions", "different instructions"),
    ],
)
def test_the_emulation_finds_faults(emulated: EmulatedNative, kernel: str, message: str) -> None:
    emulated.set_weather(Weather.ROUGH)
    try:
        assert message in emulated.fault(kernel)
        assert emulated.fault("none") == ""
    finally:
        emulated.set_weather(Weather.CALM)


@pytest.fixture(scope="session")
def setup_module() -> ModuleType:
    return setup_functions()


@pytest.mark.parametrize("target", ["sm_90", *(pytest.param(each, marks=pytest.mark.nightly) for each in ("sm_80", "sm_100"))])
def test_nvcc_compiles_without_spills(
    setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str
) -> None:
    assert target in setup_module.CUDA_TARGETS
    monkeypatch.setattr(setup_module, "CUDA_TARGETS", [target])
    nvcc = setup_module.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on the PATH nor in CUDA_HOME: the CUDA sources cannot be compiled here")
    kernels = 0
    for source in sorted((ROOT / "csrc").rglob("*.cu")):
        command = [str(nvcc), *setup_module.CUDA_FLAGS, *setup_module.cuda_codes(), f"-I{ROOT / 'csrc'}", "-c", str(source)]
        done = subprocess.run([*command, "-o", str(tmp_path / "out.o")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        report = done.stdout + done.stderr
        targets = re.findall(r"Compiling entry function '\w+' for '(\w+)'", report)
        assert set(targets) == {target}
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert len(spills) >= len(targets)
        assert all(pair == ("0", "0") for pair in spills), report
        kernels += len(targets)
    assert kernels >= 5 + 18


def test_the_build_says_what_it_leaves_out(setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MMDPO_CUDA", "0")
    assert setup_module.find_nvcc() is None
    monkeypatch.delenv("MMDPO_CUDA")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'host_config.h:153: error: -- unsupported GNU version!' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    assert setup_module.find_nvcc() == nvcc
    with pytest.raises(setup_module.CompileError, match=r"unsupported GNU version(?s:.*)MMDPO_CUDA=0"):
        setup_module.check_host_compiler(nvcc, ["g++"])
