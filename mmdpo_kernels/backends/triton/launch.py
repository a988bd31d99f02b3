"""A kernel with its arguments: run on a device, or described for a compiler without one."""

from __future__ import annotations

from contextlib import nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .runtime import DTYPE_NAMES, Specialization

_POINTERS = {dtype: f"*{name}" for dtype, name in DTYPE_NAMES.items()} | {torch.int32: "*i32", torch.int64: "*i64"}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch. `describe` turns the same object into what Triton compiles for it, so tests compile what users run."""

    kernel: Any
    """The `triton.jit` function."""
    programs: int | tuple[int, ...]
    """The grid, its first axis alone or all axes."""
    arguments: dict[str, Tensor | int | float | tuple[float, ...] | None]
    """Known at run time; None stands for a part of the kernel that is left out."""
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    """Registers that a thread may use; without it ptxas spills a few values where that lets more warps run."""
    descriptors: bool = False
    """Whether the kernel makes tensor descriptors, for which Triton asks the caller for memory."""

    def run(self) -> None:
        grid = self.programs if isinstance(self.programs, tuple) else (self.programs,)
        if 0 in grid:
            return
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        # Triton launches on the current device, whatever device the tensors are on.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg}
            if self.descriptors:
                # Triton's allocator is the context's own: the caller's, if any, stays as it is.
                copy_context().run(self._launch_with_memory, grid, options, device)
            else:
                self.kernel[grid](**self.arguments, **self.constants, **options)

    def _launch_with_memory(self, grid: tuple[int, ...], options: dict[str, int | None], device: torch.device) -> None:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
        self.kernel[grid](**self.arguments, **self.constants, **options)

    def describe(self, label: str) -> Specialization:
        """Types as Triton's launcher finds them; ":16" says that an address or number is a multiple of 16."""
        absent = {name: None for name, value in self.arguments.items() if value is None}
        fixed = {parameter.name for parameter in self.kernel.params if parameter.do_not_specialize}
        ones = {name: 1 for name, value in self.arguments.items() if type(value) is int and value == 1 and name not in fixed}
        return Specialization(
            label=label,
            kernel=self.kernel,
            signature={
                name: _type(value, name not in fixed)
                for name, value in self.arguments.items()
                if name not in absent and name not in ones
            },
            constants=absent | ones | self.constants,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            maxnreg=self.maxnreg,
        )


def aligned(*tensors: Tensor | None) -> bool:
    """Whether Triton compiles for these tensors what `describe` says: addresses of whole 16 bytes, strides of whole 16 elements.

    For others it reads narrower, which takes registers that tiles found without spills may not have left.
    """
    return all(
        tensor.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
        if tensor is not None
    )


def _type(value: Tensor | int | float | tuple[float, ...] | None, specialize: bool) -> str | tuple[str, ...]:
    if isinstance(value, tuple):
        return ("fp32",) * len(value)
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype] + ":16"  # what torch allocates is aligned
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int)
    width = "i32" if -(2**31) <= value < 2**31 else "i64"
    return width + ":16" if specialize and value % 16 == 0 else width
