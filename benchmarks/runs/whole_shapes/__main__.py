"""Command line of the whole shapes; see the package."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402

import benchmarks.runs.whole_shapes as package  # noqa: E402
from benchmarks.gpu.outcomes import fingerprint  # noqa: E402
from benchmarks.kernels.harness import measure_ceilings  # noqa: E402
from benchmarks.measure import ROOT, Place, add_place, machine, place_of  # noqa: E402
from benchmarks.runs.whole_shapes.shapes import METHODS, SHAPES  # noqa: E402

NEEDED = ("transformers", "peft", "accelerate", "datasets", "rich")
DATA_SHEET = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense bfloat16 products of NVIDIA's data sheets, SXM, operations a second."""
GUESS = 20.0
"""Seconds that a case is taken to need before one has been measured; those of a shape's first case make the shape too."""


def main(argv: Sequence[str] | None = None) -> None:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="this shape only; may be repeated")
    parser.add_argument("--method", choices=METHODS, action="append", help="this method only; may be repeated")
    parser.add_argument("--repeats", type=int, help="turns that count, after one warm-up (default 3, small 1)")
    parser.add_argument("--processor-time", action="store_true", help="seconds of processor time, for a machine that is shared")
    parser.add_argument("--seconds", type=float, help="begin no case that would not end within so many")
    parser.add_argument("--resume", action="store_true", help="keep what the result file has of this machine, code and table")
    add_place(parser)
    arguments = parser.parse_args(argv)
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f"left out: training needs {', '.join(missing)}, not installed here")
        return
    if find_spec("mmdpo_trainers") is None:
        # On a machine where nothing of ours is installed.
        sys.path.insert(0, str(ROOT / "trainers"))
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    measure(arguments, place_of(arguments, part=bool(arguments.shape or arguments.method)), begun)


def measure(arguments: argparse.Namespace, place: Place, begun: float) -> dict[str, Any]:
    """All races, written one by one. begun: from when `--seconds` count, on `time.monotonic`."""
    from benchmarks.runs.whole_shapes.cases import WEIGHED, in_turn
    from benchmarks.runs.whole_shapes.racing import Bench, quiet, race
    from benchmarks.runs.whole_shapes.subject import NotHere, Shape

    quiet()
    deadline = begun + (arguments.seconds or float("inf"))
    device, scale = torch.device(arguments.device), "small" if arguments.small else arguments.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bench = Bench(
        device=device,
        repeats=arguments.repeats or (1 if arguments.small else 3),
        progress=_say,
        clock=time.process_time if arguments.processor_time else time.perf_counter,
    )
    shapes, methods = arguments.shape or list(SHAPES), arguments.method or list(METHODS)
    name = f"whole_shapes_{device.type}"
    result = _header(scale, device, dtype, shapes) | {"processor_time": arguments.processor_time}
    kept = _measured_before(place.folder / f"{name}.json", result) if arguments.resume else {}
    result["shapes"] = {shape: kept.get(shape, {}) for shape in shapes}
    made: dict[str, Shape] = {}
    longest = 0.0
    for shape, method, ways in in_turn(together=device.type == "cpu", shapes=shapes, methods=methods):
        rows = result["shapes"][shape].setdefault(method, {})
        ways = [way for way in ways if "per_pair" not in rows.get(way, {})]
        if not ways:
            continue
        started = time.monotonic()
        if started + (longest or min(GUESS, arguments.seconds or GUESS)) > deadline:
            rows.update(dict.fromkeys(ways, {"reason": "no time was left for it"}))
        else:
            try:
                if shape not in made:
                    # One model at a time.
                    made.clear()
                    made[shape] = Shape(shape, scale, device, dtype)
                    result["sizes"][shape] |= {"parameter_bytes": made[shape].bytes}
                rows.update(race(bench, made[shape], method, ways))
            except NotHere as answer:
                rows.update(dict.fromkeys(ways, {"reason": str(answer)}))
            longest = max(longest, time.monotonic() - started)
        for row in rows.values():
            if "flops_per_second" in row:
                row["utilisation"] = row["flops_per_second"] / result["ceilings"]["measured"]
        _write(place, name, result, begun)
    if device.type == "cpu":
        _weigh(result, scale, [(shape, method, way) for shape in shapes for method in methods for way in WEIGHED[method]])
        _write(place, name, result, begun)
    print(f"\n{_text(result)}\n\n{result['minutes']:.1f} minutes; written: {place.folder / name}.json", flush=True)
    return result


def _header(scale: str, device: torch.device, dtype: torch.dtype, shapes: Sequence[str]) -> dict[str, Any]:
    ceiling = measure_ceilings(device, dtype, small=scale == "small").flops_per_second
    on = machine()
    sheet = (
        next((peak for name, peak in DATA_SHEET.items() if name in (on["gpu"] or "")), None) if device.type == "cuda" else None
    )
    return {
        "machine": on,
        "code": fingerprint(ROOT),
        "scale": scale,
        "flash_linear_attention": find_spec("fla") is not None,
        "dtype": str(dtype).removeprefix("torch."),
        "ceilings": {"measured": ceiling, "data_sheet": sheet},
        "sizes": {shape: dataclasses.asdict(SHAPES[shape][scale]) for shape in shapes},
    }


def _measured_before(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """Rows of the result file, where they are of this machine, code and scale."""
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = all(before.get(key) == header[key] for key in ("machine", "code", "scale", "processor_time"))
    return before.get("shapes", {}) if same else {}


def _weigh(result: dict[str, Any], scale: str, cases: Sequence[tuple[str, str, str]]) -> None:
    """Peak memory on the CPU of what was measured."""
    from benchmarks.runs.whole_shapes.racing import fresh_peaks, peak_of

    found = result["shapes"]
    wanted = [(shape, scale, method, way) for shape, method, way in cases if "per_pair" in found[shape][method].get(way, {})]
    # Small, where the figures say nothing, one alone and in this process.
    wanted = wanted[-1:] if scale == "small" else wanted
    peaks = [peak_of(*case) for case in wanted] if scale == "small" else fresh_peaks(wanted, _say)
    for (shape, _, method, way), peak in zip(wanted, peaks, strict=True):
        found[shape][method][way]["peak_bytes"] = peak


def _write(place: Place, name: str, result: dict[str, Any], begun: float) -> None:
    result["minutes"] = (time.monotonic() - begun) / 60
    place.result(name, result)
    # What was measured on the other kind of device stands beside it.
    texts = [
        _text(json.loads(path.read_text(encoding="utf-8")))
        for path in (place.folder / f"whole_shapes_{kind}.json" for kind in ("cpu", "cuda"))
        if path.exists()
    ]
    place.section("docs/results.md", "whole_shapes", "\n\n".join(texts))


def _text(result: dict[str, Any]) -> str:
    from benchmarks.runs.whole_shapes.page import text_of

    return text_of(result)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
