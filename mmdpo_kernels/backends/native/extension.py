"""The compiled module, or why there is none."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType


@functools.cache
def load() -> ModuleType | str:
    """`mmdpo_kernels._native`, or one line that says why it cannot be imported and what to do."""
    try:
        return importlib.import_module("mmdpo_kernels._native")
    except ImportError as error:
        return f"mmdpo_kernels._native cannot be imported ({error}); build it with `make install` or `pip install -e .`"
