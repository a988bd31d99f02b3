"""Times every backend of the ops on this machine, for the rules of `backend="auto"` (`mmdpo_kernels/backends/ops_table.py`).

    python -m benchmarks.kernels.choose_backends [--device cuda] [--repeats 5] [--seconds 40] [--output FOLDER] [--small]

Writes `benchmarks/results/choice_<device>.json`, a CPU by its kind (`choice_cpu_avx2.json`, see `cpu_kinds`), after each setting, so that an
end before its time loses none: per op, dtype and shape the seconds of each backend, the reason where one cannot serve, the fastest, and what
"auto" takes. On a GPU its minutes are for the attention ops. On the CPU seconds are processor time, since machines are shared; on a GPU they
are wall time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import ops
from benchmarks.kernels.case import CannotServe
from benchmarks.measure import add_place, alternate, place_of
from mmdpo_kernels.backends.cpu_kinds import cpu_kind
from mmdpo_kernels.backends.ops_table import OPS
from mmdpo_kernels.backends.registry import load, resolve

CPU_SHAPES = ((16, 16), (120, 16), (400, 20), (1620, 60))
CUDA_SHAPES = ((256, 32), (1024, 64), (3200, 100), (8192, 100), (16384, 200))
"""(packed length S, tokens of each of the two responses)."""
SMALL_SHAPES = ((24, 4),)
DENSE = 500
"""Longest S at which mass of every row is timed on a CPU, where only the reference has it."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One kind of call."""

    op: str
    dtype: torch.dtype
    length: int
    response: int
    tree: bool = True
    gradient: bool = True
    mass: bool = False
    heads: int = 16
    kv_heads: int = 8
    dim: int = 64

    def described(self) -> dict[str, object]:
        return {**self.__dict__, "dtype": str(self.dtype).removeprefix("torch.")}


def settings(device: str, *, small: bool = False) -> Iterator[Setting]:
    """Every kind of call that the table may tell apart; small: of one size and dtype."""
    on_gpu = device == "cuda"
    sizes = {"heads": 32, "kv_heads": 8, "dim": 128} if on_gpu else {}
    dtypes = (
        (torch.bfloat16, torch.float16, torch.float32)
        if on_gpu
        else (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    )
    shapes: tuple[tuple[int, int], ...] = CUDA_SHAPES if on_gpu else CPU_SHAPES
    if small:
        dtypes, shapes = dtypes[:1], SMALL_SHAPES
    for dtype in dtypes:
        for length, response in shapes:
            known = {"dtype": dtype, "length": length, "response": response, **sizes}
            for name, module in ops.modules().items():
                if hasattr(module, "choice_kinds"):
                    for traits in module.choice_kinds(device, mass=length <= DENSE or on_gpu):
                        yield Setting(op=name, **traits, **known)


def pair(length: int, response: int, device: str) -> Tensor:
    """(1, S) `tree_end` of a prompt with two responses; a prompt alone where there is no room for them."""
    tree_end = torch.full((1, length), length, dtype=torch.int32, device=device)
    tree_end[0, max(0, length - 2 * response) : length - response] = length - response
    return tree_end


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the calls of a setting are made from."""

    heads: Callable[[int, int], Tensor]
    """Heads and rows -> head vectors (1, heads, rows, D)."""
    key: Tensor
    value: Tensor
    segments: Tensor
    num_segments: int
    tree_end: Tensor | None


def call(setting: Setting, device: str) -> Callable[[str], Any]:
    """The call as a function of the backend's name; the same inputs for all."""
    torch.manual_seed(0)
    length = setting.length

    def heads(count: int, rows: int) -> Tensor:
        made = torch.randn(1, rows, count, setting.dim, device=device).to(setting.dtype).transpose(1, 2)
        return made.detach().requires_grad_(setting.gradient)

    inputs = Inputs(
        heads=heads,
        key=heads(setting.kv_heads, length),
        value=heads(setting.kv_heads, length),
        segments=(torch.arange(length, device=device) * 5 // length)[None],
        num_segments=5,
        tree_end=pair(length, setting.response, device) if setting.tree else None,
    )
    run: Callable[[str], Any] = ops.modules()[setting.op].choice_call(setting, inputs)
    return run


def compare(setting: Setting, device: str, repeats: int) -> dict[str, Any]:
    """Median seconds of each backend that serves the setting, the reasons of the others, the fastest, and what "auto" takes."""
    run = call(setting, device)
    able, unable = {}, {}
    for name in OPS[setting.op].backends:
        try:
            run(name)
            able[name] = partial(_finished, run, name, device)
        except torch.OutOfMemoryError:
            unable[name] = "out of memory"
        except CannotServe as answer:
            unable[name] = str(answer)
        except ValueError as error:
            unable[name] = str(error).partition(": ")[2].partition(": ")[2]
        except Exception as error:  # noqa: BLE001 - the others are still worth timing
            unable[name] = f"failed: {type(error).__name__}: {error}".splitlines()[0][:300]
    clock = time.perf_counter if device == "cuda" else time.process_time
    seconds = {name: statistics.median(found) for name, found in alternate(able, repeats, lambda line: None, clock=clock).items()}
    automatic = _automatic(setting, device)
    fastest = min(seconds, key=lambda name: seconds[name])
    return {
        **setting.described(),
        "seconds": seconds,
        "cannot": unable,
        "fastest": fastest,
        "auto": automatic,
        "auto_over_fastest": seconds[automatic] / seconds[fastest] if automatic in seconds else None,
    }


def _finished(run: Callable[[str], Any], name: str, device: str) -> None:
    run(name)
    if device == "cuda":
        torch.cuda.synchronize()


def _automatic(setting: Setting, device: str) -> str:
    """The backend that "auto" takes for the setting."""
    module = resolve(
        setting.op,
        "auto",
        torch.device(device),
        setting.dtype,
        mass=setting.mass,
        head_dim=setting.dim,
        length=setting.length,
        tree=setting.tree,
        gradient=setting.gradient,
    )
    return next(name for name in OPS[setting.op].backends if load(setting.op, name) is module)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count, after one warm-up (default 5)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no other setting after these")
    add_place(parser)
    options = parser.parse_args(argv)
    place = place_of(options)
    device = f"cpu_{cpu_kind()}" if options.device == "cpu" else torch.cuda.get_device_name().lower().replace(" ", "_")
    clock = "wall seconds" if options.device == "cuda" else "processor seconds"
    end = time.monotonic() + options.seconds
    rows: list[dict[str, Any]] = []
    for setting in settings(options.device, small=options.small):
        rows.append(compare(setting, options.device, options.repeats))
        result = {"clock": clock, "repeats": options.repeats, "settings": rows}
        path = place.result(f"choice_{device}", result)
        row = rows[-1]
        times = ", ".join(
            f"{name} {1e3 * took:.3g} ms" for name, took in sorted(row["seconds"].items(), key=lambda item: item[1])
        )
        print(f"{setting.described()}: {times}; auto takes {row['auto']}", file=sys.stderr, flush=True)
        if time.monotonic() > end:
            print(f"time is over after {len(rows)} settings", file=sys.stderr)
            break
    print(path)


if __name__ == "__main__":
    main()
