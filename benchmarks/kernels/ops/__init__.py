"""One file an op, as the rows of `mmdpo_kernels.backends.ops_table` name them: its cases, and our backends on them."""

from __future__ import annotations

import importlib
from types import ModuleType

from mmdpo_kernels.backends.ops_table import OPS


def modules() -> dict[str, ModuleType]:
    """The files by name, in the order of the table."""
    return {name: importlib.import_module(f"{__name__}.{name}") for op in OPS.values() for name in op.benchmarks}


def op_of(name: str) -> str:
    """The op that a file is about, or about a part of."""
    return next(op for op, row in OPS.items() if name in row.benchmarks)
