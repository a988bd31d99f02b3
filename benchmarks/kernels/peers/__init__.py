"""What a user would pick instead, one small file each; a package is imported only when its contestant runs."""

from __future__ import annotations

import importlib

from benchmarks.kernels.case import Contestant

MODULES = (
    "torch_dense",
    "eager_maps",
    "torch_sdpa",
    "torch_varlen",
    "torch_flex",
    "flash_attention",
    "colreduce",
    "cudnn",
    "bare_products",
    "trl_head",
    "liger",
    "cce",
    "quack",
)


def contestants(op: str) -> list[Contestant]:
    """The peers that do cases of an op, runnable here or not."""
    modules = (importlib.import_module(f"{__name__}.{name}") for name in MODULES)
    return [peer for module in modules for peer in module.CONTESTANTS.get(op, ())]
