"""`mmdpo env`: versions, devices, CPU level, which kernel backends can run here, and how to get what is missing.

Needs nothing beyond the standard library, so that it can say what else is needed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

DISTRIBUTION = "mmdpo-kernels"
EXTRAS = {
    "torch": None,
    "triton": None,
    "numpy": None,
    "transformers": "train",
    "peft": "train",
    "accelerate": "train",
    "datasets": "train",
    "pillow": "train",
    "pyyaml": "train",
    "bitsandbytes": "qlora",
    "matplotlib": "train",
}
"""Packages that are listed, and the extra that brings each; None: the package itself does."""

_LEVELS = (
    ("x86-64-v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    ("x86-64-v3", {"avx2", "bmi1", "bmi2", "fma", "f16c", "movbe"}),
    ("x86-64-v2", {"sse4_2", "ssse3", "popcnt", "cx16"}),
)

_Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""Title, columns, rows."""


def print_environment(console: Any = None) -> None:
    """Print the tables of `mmdpo env`.

    console: rich's `Console`, which draws them. None: one is made, or where rich is not installed they are plain lines.
    """
    tables = [_versions()]
    if _is_there("torch"):
        tables += [_devices(), _backends()]
    if console is None and _is_there("rich"):
        from rich.console import Console

        console = Console()
    for table in tables:
        if console is None:
            _print_plainly(*table)
        else:
            _print_drawn(console, *table)


def cpu_level() -> str:
    """Name of the highest x86-64 level this CPU has, from /proc/cpuinfo; elsewhere the machine's architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    flags = set(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())
    return next((name for name, needed in _LEVELS if needed <= flags), platform.machine())


def _versions() -> _Table:
    rows: list[tuple[str, ...]] = [
        ("python", platform.python_version()),
        (DISTRIBUTION, _version(DISTRIBUTION) or "not installed"),
    ]
    for name, extra in EXTRAS.items():
        wanted = name if extra is None else f"'{DISTRIBUTION}[{extra}]'"
        rows.append((name, _version(name) or f"not installed: pip install {wanted}"))
    return "versions", ("package", "version"), rows


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _devices() -> _Table:
    import torch

    rows: list[tuple[str, ...]] = [
        ("cpu", f"{cpu_level()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    if not torch.cuda.is_available():
        build = "this is a build of PyTorch for the CPU" if torch.version.cuda is None else "PyTorch finds no GPU"
        rows.append(("cuda", f"none: {build}"))
    return "devices", ("device", "what"), rows


def _backends() -> _Table:
    import mmdpo_kernels

    found = mmdpo_kernels.backends()
    rows: list[tuple[str, ...]] = [
        (op, name, "yes" if reason is None else f"no: {reason}")
        for op, backends in found.items()
        for name, reason in backends.items()
    ]
    return "kernel backends", ("op", "backend", "can run here"), rows


def _print_plainly(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    print(title)
    for row in (columns, *rows):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_drawn(console: Any, title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
