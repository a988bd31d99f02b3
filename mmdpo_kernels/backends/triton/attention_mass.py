"""`attention_mass` in Triton: a tile of the rows that share a key head reads its keys once, split over programs where rows are few.

Launches: 2 for rows (1 with `lse` where the keys are not split), 3 for "mean" and "tokens" (2 with `lse`), 4 backward (3 with `lse` likewise);
every 16 segments take a round of their own, and depths for a window in a tree are PyTorch's. Partial results go to a workspace and are added
in a fixed order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from ...tree_mask import depth
from ..calls import AttentionMassCall
from ..layout import dense_heads
from . import runtime
from .attention_device import COLUMNS
from .attention_mass_device import SPLITS
from .attention_mass_kernels import (
    add_parts_kernel,
    combine_splits_kernel,
    grad_key_kernel,
    grad_query_kernel,
    key_partials_kernel,
    row_partials_kernel,
)
from .attention_mass_tiles import Tile, tile_of
from .launch import Launch

_COLUMNS = COLUMNS.value
_COMBINED_ROWS = 8


def unavailable_reason(device_type: str, dtype: torch.dtype, **features: object) -> str | None:
    """None, or why this backend cannot serve tensors of `dtype` on `device_type`. It serves every feature."""
    return runtime.unavailable_reason(device_type, dtype)


def forward(
    query_rows: Tensor,  # (B, Hq, R, D)
    key: Tensor,  # (B, Hkv, S, D)
    call: AttentionMassCall,
) -> Tensor:
    """-> (B, Hq, R, N), (B, N) or (B, S) float32, as `reduce` says. With `lse`, blocks of keys that are in no segment are not read."""
    work = _Work.of(query_rows, key, call)
    out = work.forward()
    work.run()
    return out


def backward(
    grad: Tensor,
    query_rows: Tensor,
    key: Tensor,
    call: AttentionMassCall,
) -> tuple[Tensor, Tensor]:
    """-> gradients of query_rows and key: dscores = P (dP - rowsum(P dP)), dP the upstream gradient at the key's segment."""
    work = _Work.of(query_rows, key, call)
    grad_query, grad_key = work.backward(grad)
    work.run()
    return grad_query.to(query_rows.dtype), grad_key.to(key.dtype)


@cache
def _target(device: torch.device) -> int:
    major, minor = runtime.capability(device)
    return 10 * major + minor


@cache
def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 4  # described for an H100; interpreted, enough to split keys


@dataclass(kw_only=True)
class _Work:
    """Tensors as the kernels read them, and the launches so far: known from shapes alone, so they can be described without data."""

    query: Tensor
    key: Tensor
    call: AttentionMassCall
    depth: Tensor | None
    target: int
    launches: list[Launch] = field(default_factory=list)

    @classmethod
    def of(cls, query_rows: Tensor, key: Tensor, call: AttentionMassCall, target: int | None = None) -> _Work:
        """target: compute capability to launch for, 80 for 8.0; None: that of the GPU that holds the keys."""
        dtype = torch.promote_types(query_rows.dtype, key.dtype)
        query_rows, key = (dense_heads(tensor.to(dtype)) for tensor in (query_rows, key))
        return cls(
            query=query_rows,
            key=key,
            call=call._replace(
                segments=call.segments.contiguous(),
                row_positions=call.row_positions.contiguous(),
                tree_end=None if call.tree_end is None else call.tree_end.contiguous(),
                reach=None if call.reach is None else call.reach.contiguous(),
                lse=None if call.lse is None else call.lse.to(torch.float32).contiguous(),
            ),
            depth=None if call.tree_end is None or call.window is None else depth(call.tree_end),
            target=_target(key.device) if target is None else target,
        )

    def run(self) -> None:
        with torch.cuda.device_of(self.key):
            for launch in self.launches:
                launch.run()

    def forward(self) -> Tensor:
        batch, heads, rows, _ = self.query.shape
        length, count, reduce = self.key.shape[2], self.call.num_segments, self.call.reduce
        shape = {None: (batch, heads, rows, count), "mean": (batch, count), "tokens": (batch, length)}[reduce]
        if 0 in (batch, heads, rows, length, *shape):
            return torch.zeros(shape, dtype=torch.float32, device=self.key.device)
        out, lse = self.workspace(*shape), self.call.lse
        if reduce == "tokens":
            self.token_means(lse, out)
        else:
            for first in range(0, count, _COLUMNS):
                lse = self.segment_masses(lse, first, reduce == "mean", out)
        return out

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        query, key, reduce = self.query, self.key, self.call.reduce
        if 0 in (*grad.shape, *query.shape, *key.shape):
            return torch.zeros_like(query), torch.zeros_like(key)
        # A reduced gradient is one a key, shared by all rows; the kernels divide their sums by the number of rows.
        strides = grad.stride() if reduce is None else (grad.stride(0), 0, 0, grad.stride(1))
        upstream = {
            "segments": None if reduce == "tokens" else self.call.segments,
            "grad": grad,
            "end_segment": key.shape[2] if reduce == "tokens" else self.call.num_segments,
            **_named("grad_", "bhrn", strides),
        }
        found, correction = self.row_corrections(self.call.lse, upstream, per_row=reduce is None)
        grad_query, grad_key = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key))
        common = self.common_arguments() | upstream | {"lse": found, "correction": correction}
        flags = {"PER_ROW": reduce is None, "MEAN": reduce is not None}
        tile = self.tile("query")
        grid = (triton.cdiv(self.packed_rows, tile.block_m), self.pairs)
        self.add(grad_query_kernel, grid, common | {"grad_query": grad_query}, self.constants(tile) | flags, tile)
        tile = self.tile("key")
        grid = (triton.cdiv(key.shape[2], tile.block_n), self.pairs)
        self.add(grad_key_kernel, grid, common | {"grad_key": grad_key}, self.constants(tile) | flags, tile)
        return grad_query, grad_key

    def segment_masses(self, lse: Tensor | None, first: int, mean: bool, out: Tensor) -> Tensor | None:
        """Masses of _COLUMNS segments from `first` on into `out` -> lse, where it is known now."""
        batch, heads, rows, _ = self.query.shape
        end = min(first + _COLUMNS, self.call.num_segments)
        tiles, splits, pairs = self.row_grid("scores")[0]
        options: dict[str, Any] = {"segments": self.call.segments, "first_segment": first, "end_segment": end}
        if lse is not None and mean:
            parts = self.workspace(batch, pairs // batch * tiles * splits, _COLUMNS)
            self.row_partials(lse, None, None, parts, "mass", sum_rows=True, **options)
            self.add_parts(parts, out[:, first:end])
            return lse
        if lse is not None and splits == 1:
            self.row_partials(lse, None, None, out[..., first:], "mass", row_stride=out.stride(2), **options)
            return lse
        split_max, split_sum = (None, None) if lse is not None else self.split_state(splits)
        mass = self.workspace(splits, batch, heads, rows, _COLUMNS)
        self.row_partials(lse, split_max, split_sum, mass, "mass", row_stride=_COLUMNS, **options)
        new_lse = self.workspace(batch, heads, rows) if lse is None and end < self.call.num_segments else None
        if mean:
            parts = self.workspace(batch, triton.cdiv(heads * rows, _COMBINED_ROWS), _COLUMNS)
            self.combine_splits(split_max, split_sum, mass, new_lse, parts, sum_rows=True)
            self.add_parts(parts, out[:, first:end])
        else:
            self.combine_splits(split_max, split_sum, mass, new_lse, out[..., first:end])
        return lse if new_lse is None else new_lse

    def token_means(self, lse: Tensor | None, out: Tensor) -> None:
        batch, length = out.shape
        tile = self.tile("scores")
        splits = self.row_grid("scores")[0][1]
        split_max = split_sum = None
        if lse is None:
            split_max, split_sum = self.split_state(splits)
            self.row_partials(None, split_max, split_sum, None, "lse")
        parts = self.workspace(batch, self.pairs // batch, length)
        arguments = self.common_arguments() | {
            "lse": lse,
            "split_max": split_max,
            "split_sum": split_sum,
            "output": parts,
            "splits": splits,
        }
        self.add(key_partials_kernel, (triton.cdiv(length, tile.block_n), self.pairs), arguments, self.constants(tile), tile)
        self.add_parts(parts, out)

    def row_corrections(self, lse: Tensor | None, upstream: dict[str, Any], *, per_row: bool) -> tuple[Tensor, Tensor]:
        """-> lse and rowsum(P dP), both (B, Hq, R)."""
        shape = self.query.shape[:3]
        splits = self.row_grid("corrections")[0][1]
        split_max, split_sum = (None, None) if lse is not None else self.split_state(splits)
        parts = self.workspace(splits, *shape, 1)
        self.row_partials(lse, split_max, split_sum, parts, "gradient", per_row=per_row, row_stride=1, **upstream)
        if lse is not None and splits == 1:
            return lse, parts[0]
        found = self.workspace(*shape) if lse is None else lse
        correction = self.workspace(*shape, 1)
        self.combine_splits(split_max, split_sum, parts, found, correction)
        return found, correction

    def row_partials(
        self,
        lse: Tensor | None,
        split_max: Tensor | None,
        split_sum: Tensor | None,
        mass: Tensor | None,
        what: str,
        *,
        sum_rows: bool = False,
        per_row: bool = False,
        **options: Any,
    ) -> None:
        work = "corrections" if what == "gradient" else "scores"
        tile = self.tile(work)
        grid, blocks = self.row_grid(work)
        arguments = self.common_arguments() | {
            "segments": None,
            "grad": None,
            **_named("grad_", "bhrn", (0, 0, 0, 0)),
            "lse": lse,
            "split_max": split_max,
            "split_sum": split_sum,
            "mass": mass,
            "blocks": blocks,
            "first_segment": 0,
            "end_segment": 0,
            "split_stride": self.query.shape[:3].numel(),
            "row_stride": 0,
            **options,
        }
        constants = self.constants(tile) | {"WHAT": what, "SUM_ROWS": sum_rows, "PER_ROW": per_row}
        self.add(row_partials_kernel, grid, arguments, constants, tile)

    def combine_splits(
        self,
        split_max: Tensor | None,
        split_sum: Tensor | None,
        mass: Tensor,  # (splits, B, Hq, R, columns)
        lse: Tensor | None,
        out: Tensor,
        *,
        sum_rows: bool = False,
    ) -> None:
        splits, batch, heads, rows, columns = mass.shape
        arguments = {
            "split_max": split_max,
            "split_sum": split_sum,
            "mass": mass,
            "lse": lse,
            "output": out,
            "batch_rows": heads * rows,
            "splits": splits,
            "num_columns": out.shape[-1],
            "output_stride": out.stride(-2),
        }
        constants = {"SUM_ROWS": sum_rows, "WIDTH": columns, "BLOCK_R": _COMBINED_ROWS}
        self.add(combine_splits_kernel, (triton.cdiv(heads * rows, _COMBINED_ROWS), batch), arguments, constants)

    def add_parts(self, parts: Tensor, out: Tensor) -> None:
        """parts (B, T, C) -> out (B, columns of out), the mean over heads and used rows."""
        batch, num_columns = out.shape
        block_t, block_c = (256, _COLUMNS) if num_columns <= _COLUMNS else (32, 128)
        arguments = {
            "parts": parts,
            "output": out,
            "row_positions": self.call.row_positions,
            "num_rows": self.query.shape[2],
            "heads": self.query.shape[1],
            "num_parts": parts.shape[1],
            "width": parts.shape[2],
            "num_columns": num_columns,
            "output_stride": out.stride(0),
        }
        grid = (triton.cdiv(num_columns, block_c), batch)
        self.add(add_parts_kernel, grid, arguments, {"BLOCK_T": block_t, "BLOCK_C": block_c})

    def add(
        self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], constants: dict[str, Any], tile: Tile | None = None
    ) -> None:
        num_warps, num_stages = (4, 1) if tile is None else (tile.num_warps, tile.num_stages)
        self.launches.append(
            Launch(
                kernel=kernel,
                programs=grid,
                arguments=arguments,
                constants=constants,
                num_warps=num_warps,
                num_stages=num_stages,
                maxnreg=255,
            )
        )

    def tile(self, work: str) -> Tile:
        return tile_of(work, self.query.dtype, self.block_d, self.target)

    def row_grid(self, work: str) -> tuple[tuple[int, int, int], int]:
        """-> grid of `row_partials_kernel` (row tiles, splits, B * Hkv), and key blocks a split: two programs a processor, where it can."""
        tile = self.tile(work)
        tiles, blocks = triton.cdiv(self.packed_rows, tile.block_m), triton.cdiv(self.key.shape[2], tile.block_n)
        wanted = triton.cdiv(2 * _processors(self.key.device), tiles * self.pairs)
        blocks_per_split = triton.cdiv(blocks, min(SPLITS.value, wanted))
        return (tiles, triton.cdiv(blocks, blocks_per_split), self.pairs), blocks_per_split

    @property
    def pairs(self) -> int:
        """Batch rows times key heads."""
        return self.key.shape[0] * self.key.shape[1]

    @property
    def packed_rows(self) -> int:
        return self.query.shape[2] * self.query.shape[1] // self.key.shape[1]

    @property
    def block_d(self) -> int:
        return max(16, triton.next_power_of_2(self.query.shape[-1]))

    def common_arguments(self) -> dict[str, Any]:
        return {
            "query": self.query,
            "key": self.key,
            "row_positions": self.call.row_positions,
            "tree_end": self.call.tree_end,
            "reach": self.call.reach,
            "depth": self.depth,
            "scale": self.call.scale,
            "softcap": self.call.softcap,
            "window": self.call.window,
            "num_rows": self.query.shape[2],
            "group": self.query.shape[1] // self.key.shape[1],
            "kv_heads": self.key.shape[1],
            "length": self.key.shape[2],
            **_named("query_", "bhr", self.query.stride()),
            **_named("key_", "bhs", self.key.stride()),
        }

    def workspace(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.key.device)

    def split_state(self, splits: int) -> tuple[Tensor, Tensor]:
        """Running maximum and sum of each row and split."""
        return self.workspace(splits, *self.query.shape[:3]), self.workspace(splits, *self.query.shape[:3])

    def constants(self, tile: Tile) -> dict[str, Any]:
        return {
            "DIM": self.query.shape[-1],
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_D": self.block_d,
            "STEP_D": tile.step_d,
        }


REPRESENTATIVE = ("rows bf16 128 tree reach window softcap",)
"""Every feature at once in the kernels that have fewest registers to spare, at the models' head dim."""


def specializations(target: int) -> list[runtime.Specialization]:
    """What the launchers ask for at the sizes of a training step: every kernel, dtype and way of reading head vectors, each form once.

    In bfloat16 with every set of features.
    """
    found = []
    sizes = [*itertools.product(runtime.DTYPES, (64, 128, 256)), (torch.bfloat16, 80), (torch.bfloat16, 512)]
    for dtype, dim in sizes:
        every = dtype == torch.bfloat16 and dim in (64, 128, 256)
        forms = list(itertools.product(_HEAVIEST, _SETS if every else _FULLEST))
        if dim == 128:
            forms += itertools.product(_OTHERS, [""])
        for (reduce, known), extras in forms:
            for work, name in _described_work(target, dtype, dim, reduce, known, extras):
                label = f"{name} {runtime.DTYPE_NAMES[dtype]} {dim}{extras}"
                for launch in work.launches:
                    found.append(launch.describe(f"attention_mass {launch.kernel.__name__.removesuffix('_kernel')} {label}"))
    return runtime.distinct(found)


# Features as they stand in the label.
_SETS = [" " + " ".join(("tree", *names)) for names in runtime.feature_sets(("reach", "window", "softcap"))]
_FULLEST = [" tree window softcap", " tree reach window softcap"]
# reduce, and whether the lse is known: of the kernels with most registers, and of the others.
_HEAVIEST = ((None, False), ("tokens", True))
_OTHERS = (("mean", False), ("mean", True), ("tokens", False))


def _described_work(
    target: int,
    dtype: torch.dtype,
    dim: int,
    reduce: str | None,
    known: bool,
    extras: str,
) -> Iterator[tuple[_Work, str]]:
    batch, heads, kv_heads, rows, length, count = 2, 32, 8, 100, 3100, 5
    with torch.device("meta"):
        query, key = torch.empty(batch, heads, rows, dim, dtype=dtype), torch.empty(batch, kv_heads, length, dim, dtype=dtype)
        segments, positions = (torch.empty(batch, size, dtype=torch.int32) for size in (length, rows))
        tree_end, reach = (
            torch.empty(batch, length, dtype=torch.int32) if name in extras else None for name in ("tree", "reach")
        )
        lse = torch.empty(batch, heads, rows) if known else None
    softcap, window = 2.0 if "softcap" in extras else None, 1024 if "window" in extras else None
    for name in ("forward", "backward"):
        call = AttentionMassCall(segments, positions, count, tree_end, lse, dim**-0.5, softcap, window, reduce, reach)
        work = _Work.of(query, key, call, target)
        out = work.forward()
        if name == "backward":
            work.launches.clear()
            work.backward(out)
        yield work, f"{name} {reduce or 'rows'}{' lse' if known else ''}"


def _named(prefix: str, axes: str, strides: Sequence[int]) -> dict[str, int]:
    return {prefix + axis: stride for axis, stride in zip(axes, strides, strict=False)}
