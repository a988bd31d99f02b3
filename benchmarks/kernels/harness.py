"""Checks, times and weighs the contestants of a case, in turn and in one process."""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.case import CannotServe, Case, Ceilings, Contestant, Named, NotOfThisCase, Run
from benchmarks.measure import ROOT, peak_memory

# Largest error allowed, as a share of the truth's norm. float32 in tf32 arithmetic, near 3e-4, is a wrong result.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# A single entry may be off by this many times the bound, as a share of the largest entry.
SINGLE = 4
# A contestant that needs more than this in a case leaves its later turns.
MOST_SECONDS = {"cpu": 20.0, "cuda": 0.3}
LEAST_TURNS = 3


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How one run of the harness measures."""

    device: torch.device
    dtype: torch.dtype
    size: str
    """A key of `Case.sizes`."""
    repeats: int
    check_only: bool = False
    memory: bool = True
    deadline: float = float("inf")
    """On `time.monotonic`; what has not begun by then is left out."""


class WrongResult(Exception):  # noqa: N818 - an answer, not an error
    """A contestant's result is not the truth; the message says where."""


def race(
    case: Case,
    contestants: Sequence[Contestant],
    setting: Setting,
    ceilings: Ceilings,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Figures of one case. No contestant whose result is wrong is timed.

    Returns:
        JSON-able: the case, its floor, and by contestant either `seconds` with what follows from them, or under `reason`, `wrong` or
        `failed` why there are none.
    """
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    setting = replace(setting, dtype=case.dtype or setting.dtype)
    problem = case.make(case.sizes[setting.size], setting.device, setting.dtype)
    work = case.work(problem)
    floor = work.floor(ceilings)
    entries: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    try:
        truth = case.truth(problem)
    except torch.OutOfMemoryError:
        truth = None
    for contestant in contestants:
        progress(f"{case.op} {case.name}: checking {contestant.name}")
        try:
            if truth is None:
                raise CannotServe("the float64 truth needs more memory than the GPU has")
            if time.monotonic() > setting.deadline:
                raise CannotServe("out of time")
            run, entry = admit(contestant, problem, truth, setting)
            runs[contestant.name] = run
        except NotOfThisCase:
            continue
        except CannotServe as answer:
            entry = {"reason": str(answer)}
        except WrongResult as answer:
            entry = {"wrong": str(answer)}
        except torch.OutOfMemoryError:
            entry = {"reason": "it needs more memory than the GPU has"}
        except Exception as error:  # noqa: BLE001 - a peer may fail in any way, the others go on
            if "cannot serve this call" in str(error):
                entry = {"reason": str(error).split("cannot serve this call: ")[-1]}
            else:
                entry = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        entries[contestant.name] = {"ours": contestant.ours, "version": _version(contestant.package), **entry}
        for kind in ("wrong", "failed"):
            if kind in entry:
                progress(f"{case.op} {case.name}: {contestant.name} {kind}: {entry[kind]}")
    del truth
    if not setting.check_only:
        seconds, calls = _take_turns(runs, setting, progress)
        for name, times in seconds.items():
            median = statistics.median(times)
            entries[name] |= {"seconds": times, "median": median, "percent_of_floor": 100 * floor / median}
            if calls[name]:
                entries[name]["median_of_whole_call"] = statistics.median(calls[name])
            if setting.memory:
                progress(f"{case.op} {case.name}: memory of {name}")
                entries[name]["peak_bytes"] = _peak_bytes(case, name, runs[name], setting)
    return {
        "op": case.op,
        "case": case.name,
        "why": case.why,
        "timed": case.timed,
        "sizes": dict(case.sizes[setting.size]),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "flops": work.flops,
        "bytes": work.bytes,
        "floor_seconds": floor,
        "bound": work.bound(ceilings),
        "contestants": entries,
    }


def admit(contestant: Contestant, problem: Any, truth: Named, setting: Setting) -> tuple[Run, dict[str, Any]]:
    """The contestant's run and its errors. Its first call compiles and tunes what has to be.

    Raises:
        CannotServe, NotOfThisCase, WrongResult: it does not take part.
    """
    reason = contestant.unavailable_reason(setting.device.type, setting.dtype)
    if reason is not None:
        raise CannotServe(reason)
    run = contestant.prepare(problem)
    found = run.call()
    with torch.no_grad():
        results = run.results(found)
    errors = {name: error_of(name, results[name], truth[name], setting.dtype) for name in truth if name in results}
    if not errors:
        raise WrongResult(f"it returned none of {', '.join(truth)}")
    return run, {"errors": errors, "omits": [name for name in truth if name not in results]}


def error_of(name: str, found: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """Norm of the error as a share of the truth's norm. Entries that are minus infinity in both agree.

    Raises:
        WrongResult: it exceeds the bound of the dtype, somewhere or on the whole.
    """
    if found.shape != truth.shape:
        raise WrongResult(f"{name} has shape {tuple(found.shape)}, not {tuple(truth.shape)}")
    found, truth = found.detach().double(), truth.double()
    difference = torch.where(found == truth, 0.0, found - truth)
    finite = truth.where(truth.isfinite(), 0.0)
    norm = float(difference.norm() / finite.norm().clamp(min=1e-300))
    single = float(difference.abs().max() / finite.abs().max().clamp(min=1e-300))
    bound = BOUNDS[dtype]
    # NaN is in no order with anything.
    if not (norm <= bound and single <= SINGLE * bound):
        raise WrongResult(
            f"{name} is off by {norm:.1e} of its norm, at worst by {single:.1e} of its largest entry; {bound:.0e} and "
            f"{SINGLE * bound:.0e} are allowed in {dtype}"
        )
    return norm


def _take_turns(
    runs: Mapping[str, Run], setting: Setting, progress: Callable[[str], None]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each run, and on a GPU seconds of the whole call as the caller sees it; one more turn warms up."""
    timer = CudaTimer(setting.device) if setting.device.type == "cuda" else None
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    calls: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(setting.repeats + 1):
        progress(f"turn {turn}/{setting.repeats}" if turn else "warm-up")
        for name, run in runs.items():
            enough = len(seconds[name]) >= LEAST_TURNS
            if enough and (sum(seconds[name]) > MOST_SECONDS[setting.device.type] or time.monotonic() > setting.deadline):
                continue
            whole = timed(run.call, setting.device)
            took = whole if timer is None else timer.seconds(run.call, whole)
            if turn:
                seconds[name].append(took)
                if timer is not None:
                    calls[name].append(whole)
    return seconds, calls


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, with what it leaves running on a GPU."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class CudaTimer:
    """Seconds on the GPU: events around calls, the L2 cache emptied before each, launches queued ahead so that none is waited for."""

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(4 * max(cache, 1 << 24), dtype=torch.int8, device=device)

    def seconds(self, call: Callable[[], Any], whole: float) -> float:
        """Median over several calls; `whole` is about what one takes when waited for."""
        count = max(1, min(20, int(0.01 / whole)))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        # At some 2 GHz the GPU sleeps for as long as the host needs to queue everything.
        torch.cuda._sleep(int(min(0.05, 1.5 * count * whole) * 2e9))
        for start, stop in events:
            self._flush.zero_()
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(stop) / 1e3 for start, stop in events)


def measure_ceilings(device: torch.device, dtype: torch.dtype, *, small: bool) -> Ceilings:
    """The best of several large matrix products and copies."""
    side, count = {
        ("cuda", False): (8192, 1 << 30),
        ("cpu", False): (2048, 1 << 28),
    }.get((device.type, small), (256, 1 << 22))
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.empty(count, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    turns = 3 if small else 8
    product = min(timed(lambda: left @ right, device) for _ in range(turns))
    copy = min(timed(lambda: target.copy_(source), device) for _ in range(turns))
    return Ceilings(flops_per_second=2 * side**3 / product, bytes_per_second=2 * count / copy)


def _peak_bytes(case: Case, name: str, run: Run, setting: Setting) -> int | None:
    """Bytes at the peak of one call above what stood before it; None where a fresh process could not tell."""
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(setting.device)
        before = torch.cuda.memory_allocated(setting.device)
        run.call()
        return int(torch.cuda.max_memory_allocated(setting.device) - before)
    wanted = json.dumps({"op": case.op, "case": case.name, "contestant": name, "dtype": str(setting.dtype), "size": setting.size})
    # Blocks of their own go back at once, as in an allocator made for tensors.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    command = [sys.executable, "-m", "benchmarks", "--memory-of", wanted]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, cwd=ROOT)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def memory_of(case: Case, contestant: Contestant, dtype: torch.dtype, size: str) -> int:
    """Peak bytes of one call on the CPU in this process, in which nothing else has run; a tiny call loads the code first."""
    device = torch.device("cpu")
    contestant.prepare(case.make(case.sizes["small"], device, dtype)).call()
    run = contestant.prepare(case.make(case.sizes[size], device, dtype))
    with suppress(OSError, AttributeError):
        # What the tiny call and the inputs left free would hide as much of this call.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return peak_memory(run.call)


def _version(package: str | None) -> str | None:
    if package is None:
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return None
