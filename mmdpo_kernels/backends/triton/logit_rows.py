"""The row kernels of `linear_logprobs` in Triton: one launch, one program a row.

Few rows are not split over more programs: 200 rows of 152,000 bfloat16 logits are 61 MB, some 20 us at 3 TB/s, and 200 programs are resident
at once on 132 processors. Each product beside them reads a weight of 1.2 GB where hidden states have 4096 elements, 0.4 ms.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..logit_options import STATS, LogitOptions
from . import logit_rows_tiles as tiles
from . import measured_tiles
from .launch import Launch, aligned
from .logit_rows_kernels import fold_rows_kernel
from .runtime import DTYPE_NAMES, DTYPES, Specialization


def fold(
    logits: Tensor,  # (R, V) hidden @ weight.T + bias, the last stride 1
    targets: Tensor,  # (R,)
    options: LogitOptions,
    stats: tuple[str, ...],
) -> tuple[Tensor, dict[str, Tensor]]:
    """-> log-probabilities (R,) and statistics (R,) each in float32, 0 where the target is ignored."""
    return _run(logits, targets, options, stats, None)


def fold_with_gradient(
    logits: Tensor, targets: Tensor, options: LogitOptions, stats: tuple[str, ...], coefficient_scale: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `fold`; `logits` become `coefficient_scale` times d log-probability / d (hidden @ weight.T + bias), in place."""
    return _run(logits, targets, options, stats, coefficient_scale)


def _run(
    logits: Tensor, targets: Tensor, options: LogitOptions, stats: tuple[str, ...], coefficient_scale: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    launch, logps, found = _prepare(logits, targets, options, stats, coefficient_scale)
    launch.run()
    return logps, found


def _prepare(
    logits: Tensor, targets: Tensor, options: LogitOptions, stats: tuple[str, ...], coefficient_scale: float | None
) -> tuple[Launch, Tensor, dict[str, Tensor]]:
    """-> the launch, and what it fills."""
    rows, width = logits.shape
    logps = torch.empty(rows, dtype=torch.float32, device=logits.device)
    found = {name: torch.empty_like(logps) for name in stats}
    slope = options.logit_scale / options.temperature
    # As the sweep's calls: with their gradient, which reads a row twice.
    timed = logits.dtype == torch.bfloat16 and not stats and coefficient_scale is not None and rows > 0
    found_fastest = measured_tiles.fastest_block(rows, logits.device) if timed and aligned(logits) else None
    block = tiles.choose(logits.dtype, stats, found_fastest)
    launch = Launch(
        kernel=fold_rows_kernel,
        programs=rows,
        arguments={
            "logits": logits,
            "targets": targets.contiguous(),
            "logps": logps,
            **{name: found.get(name) for name in STATS},
            "inner": None if options.softcap is None else options.logit_scale / options.softcap,
            "outer": slope if options.softcap is None else options.softcap / options.temperature,
            "factor": None if coefficient_scale is None else coefficient_scale * slope,
            "ignore_index": options.ignore_index,
            "width": width,
            "stride": logits.stride(0),
        },
        constants={"BLOCK": block.columns, "STAGES": block.num_stages, "KEEP": block.keep},
        num_warps=block.num_warps,
        num_stages=block.num_stages,
        maxnreg=block.registers,
    )
    return launch, logps, found


REPRESENTATIVE = ("gradient bf16 softcap entropy",)
"""The form with most to hold in registers."""


def specializations(target: int) -> list[Specialization]:
    """Every dtype with and without a gradient, a softcap and the statistics, and vocabularies that are no multiple of 16."""
    found = []
    for dtype, scale, softcap, stats in itertools.product(DTYPES, (None, 1.0), (None, 30.0), _DESCRIBED_STATS):
        for width in (151936, 92553) if dtype == torch.bfloat16 else (151936,):
            logits = torch.empty(256, width, dtype=dtype, device="meta")
            targets = torch.empty(256, dtype=torch.int64, device="meta")
            launch, *_ = _prepare(logits, targets, LogitOptions(softcap, 1.0, 1.0, -100), stats, scale)
            words = ["logit_rows", "fold" if scale is None else "gradient", DTYPE_NAMES[dtype]]
            words += ["softcap"] * (softcap is not None) + list(stats) + ["odd"] * (width % 16 != 0)
            found.append(launch.describe(" ".join(words)))
    return found


def candidates() -> list[Specialization]:
    """`logit_rows_tiles.CANDIDATES` as `specializations` has the shipped forms, with the gradient that they are timed with."""
    logits = torch.empty(256, 151936, dtype=torch.bfloat16, device="meta")
    targets = torch.empty(256, dtype=torch.int64, device="meta")
    found = []
    for block in tiles.CANDIDATES:
        with tiles.override(block):
            launch, *_ = _prepare(logits, targets, LogitOptions(None, 1.0, 1.0, -100), (), 1.0)
        found.append(launch.describe(f"logit_rows gradient bf16, {block.words}"))
    return found


# What training asks for, the most without a running value, and the most.
_DESCRIBED_STATS = ((), ("max_logp", "is_top1"), STATS)
