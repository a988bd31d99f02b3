"""`mmdpo env`: versions, devices, CPU level and which kernel backends can run here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from rich.console import Console, Group
from rich.table import Table

PACKAGES = (
    "mmdpo-kernels",
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "pillow",
    "numpy",
)

_LEVELS = (
    ("x86-64-v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    ("x86-64-v3", {"avx2", "bmi1", "bmi2", "fma", "f16c", "movbe"}),
    ("x86-64-v2", {"sse4_2", "ssse3", "popcnt", "cx16"}),
)


def print_environment(console: Console) -> None:
    """Print the tables of `mmdpo env`."""
    console.print(Group(_versions(), _devices(), _backends()))


def cpu_level() -> str:
    """Name of the highest x86-64 level this CPU has, from /proc/cpuinfo; elsewhere the machine's architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    flags = set(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())
    return next((name for name, needed in _LEVELS if needed <= flags), platform.machine())


def _versions() -> Table:
    table = Table(title="versions", title_justify="left")
    table.add_column("package")
    table.add_column("version")
    table.add_row("python", platform.python_version())
    for name in PACKAGES:
        try:
            table.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(name, "not installed")
    return table


def _devices() -> Table:
    import torch

    table = Table(title="devices", title_justify="left")
    table.add_column("device")
    table.add_column("what")
    table.add_row("cpu", f"{cpu_level()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        table.add_row(f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        table.add_row("cuda", "none")
    return table


def _backends() -> Table:
    import mmdpo_kernels

    table = Table(title="kernel backends", title_justify="left")
    for column in ("op", "backend", "can run here"):
        table.add_column(column)
    for op, backends in mmdpo_kernels.backends().items():
        for name, reason in backends.items():
            table.add_row(op, name, "yes" if reason is None else f"no: {reason}")
    return table
