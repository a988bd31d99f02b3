"""Timing and memory for side-by-side runs on a noisy machine: alternate, take medians, say on what."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mmdpo_kernels.backends.cpu_kinds import cpu_kind

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "numpy")


def alternate(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int,
    progress: Callable[[str], None],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each function, run in turn `repeats` times after one warm-up each, so that noise falls on all alike.

    clock: `time.process_time` counts processor time, for a machine that is shared.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = clock()
            function()
            took = clock() - start
            progress(f"{'warm-up' if turn == 0 else f'{turn}/{repeats}'} {name}: {took:.2f} s")
            if turn:
                seconds[name].append(took)
    return seconds


def ratios(seconds: Mapping[str, list[float]], slow: str, fast: str) -> dict[str, float]:
    """How many times faster: the median over turns of the ratio within a turn, with the smallest and largest."""
    found = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes of resident memory at the peak of one call, above what was resident before it (Linux).

    Call it in a fresh process: an allocator that kept pages from earlier work would hide new ones.
    """
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    function()
    return _status("VmHWM") - before


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_name(),
        "cpu_kind": cpu_kind(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def write_result(name: str, result: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Write `<name>.json` into `results/` or another folder, with the machine beside the figures."""
    folder = RESULTS if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n", encoding="utf-8")
    return path


def write_section(page: str, name: str, text: str) -> None:
    """Replace what stands between `<!-- name: begin -->` and `<!-- name: end -->` in a page of the repository.

    Raises ValueError where the page has no such section.
    """
    path = ROOT / page
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    content = path.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ValueError(f"{page} needs the lines {begin} and {end} once each")
    before, rest = content.split(begin)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where results go. Only whole ones of full size may stand in the place of the committed files and of the pages' sections."""

    folder: Path
    committed: bool

    def result(self, name: str, result: Mapping[str, Any]) -> Path:
        """As `write_result`."""
        return write_result(name, result, self.folder)

    def section(self, page: str, name: str, text: str) -> None:
        """As `write_section`; beside the committed ones, a file of its own."""
        if self.committed:
            write_section(page, name, text)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{Path(page).stem}_{name}.md").write_text(text + "\n", encoding="utf-8")


def add_place(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument(
        "--small", action="store_true", help="tiny inputs, to see that everything runs; written to build/benchmarks"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where results go in place of benchmarks/results and the pages"
    )


def place_of(arguments: argparse.Namespace, *, part: bool = False) -> Place:
    """What the options say. part: whether the result is no whole one for another reason than its size."""
    whole = not (arguments.small or part or arguments.output)
    folder = arguments.output or (RESULTS if whole else ROOT / "build" / "benchmarks")
    return Place(folder=folder.resolve(), committed=whole)


def run_mmdpo(*arguments: str) -> None:
    """`mmdpo` in this process. Raises SystemExit where it fails."""
    from mmdpo_trainers.cli.main import main

    status = main(arguments)
    if status:
        raise SystemExit(f"mmdpo {' '.join(arguments)} ended with {status}")


def settings_of(changes: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Changes of a run's configuration, section by section, as options of `mmdpo run`. `arms` and what is no section are set whole."""
    options: list[str] = []
    for name, value in changes.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key != "arms" and key.count(".") < 2:
            options += settings_of(value, f"{key}.")
        else:
            options += ["--set", f"{key}={json.dumps(value)}"]
    return options


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *([cell.replace("|", "/") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; memory is measured on Linux only")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
