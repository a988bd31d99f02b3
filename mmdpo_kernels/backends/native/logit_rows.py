"""The row kernels of `linear_logprobs` in CUDA C++: what one row of logits gives.

From compute capability 9.0 on a row is shared by a cluster of thread blocks. For the gradient they keep it in their shared memory, so that each
logit is read once and written once, as long as they have room for it; otherwise it is read twice.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..logit_options import STATS, LogitOptions
from .attention_mass import DTYPES
from .extension import address, cuda_reason, load, module

OP = "linear_logprobs"


class Place(NamedTuple):
    """The GPU, as the kernels divide rows among its blocks."""

    device: int
    multiprocessors: int
    capability: int
    """Major number."""
    shared_bytes: int
    """Shared memory of a multiprocessor."""


def unavailable_reason(device_type: str, dtype: torch.dtype, **features: object) -> str | None:
    """None, or why these kernels cannot serve logits of `dtype` on `device_type`."""
    native = load()
    if isinstance(native, str):
        return native
    if device_type != "cuda":
        return f"it runs on cuda tensors, got {device_type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"on CUDA it takes float32, bfloat16 and float16, got {dtype}"
    return cuda_reason(native)


def fold(
    logits: Tensor,  # (R, V) hidden @ weight.T + bias, the last stride 1
    targets: Tensor,  # (R,)
    options: LogitOptions,
    stats: tuple[str, ...],
) -> tuple[Tensor, dict[str, Tensor]]:
    """-> log-probabilities (R,) and statistics (R,) each in float32, 0 where the target is ignored, NaN where it is out of range."""
    return _run_on_gpu(logits, targets, options, stats, None)


def fold_with_gradient(
    logits: Tensor, targets: Tensor, options: LogitOptions, stats: tuple[str, ...], coefficient_scale: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `fold`; `logits` become `coefficient_scale` times d log-probability / d (hidden @ weight.T + bias), in place."""
    return _run_on_gpu(logits, targets, options, stats, coefficient_scale)


def _run_on_gpu(
    logits: Tensor, targets: Tensor, options: LogitOptions, stats: tuple[str, ...], coefficient_scale: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.cuda.device(logits.device):
        device = torch.cuda.current_device()
        found = torch.cuda.get_device_properties(device)
        place = Place(device, found.multi_processor_count, found.major, found.shared_memory_per_multiprocessor)
        stream = torch.cuda.current_stream().cuda_stream
        return _run(module(OP), logits, targets, options, stats, coefficient_scale, place, stream)


def _run(
    native: ModuleType,
    logits: Tensor,
    targets: Tensor,
    options: LogitOptions,
    stats: tuple[str, ...],
    coefficient_scale: float | None,
    place: Place,
    stream: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    rows, width = logits.shape
    targets = targets.contiguous()
    logps = torch.empty(rows, dtype=torch.float32, device=logits.device)
    found = {name: torch.empty_like(logps) for name in stats}
    native.logit_rows_cuda(
        sizes=(rows, width, logits.stride(0)),
        dtype=native.dtypes.index(DTYPES[logits.dtype]),
        logits=logits.data_ptr(),
        targets=targets.data_ptr(),
        softcap=options.softcap or 0.0,
        logit_scale=options.logit_scale,
        temperature=options.temperature,
        ignore_index=options.ignore_index,
        logps=logps.data_ptr(),
        **{name: address(found.get(name)) for name in STATS},
        gradient=coefficient_scale is not None,
        coefficient_scale=coefficient_scale or 0.0,
        place=place,
        stream=stream,
    )
    return logps, found
