"""`attention_mass` in C++ on the CPU: scores live in cache-sized tiles, and a group of heads reads its keys once."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ...tree_mask import depth
from .extension import load

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}


def unavailable_reason(device_type: str, dtype: torch.dtype, **features: object) -> str | None:
    """None, or why this backend cannot serve tensors of `dtype` on `device_type`. It serves every feature."""
    native = load()
    if isinstance(native, str):
        return native
    if device_type != "cpu":
        return f"it runs on cpu tensors, got {device_type}"
    if dtype not in DTYPES:
        return f"it takes {', '.join(DTYPES.values())}, got {dtype}"
    try:
        native.cpu_level()
    except ValueError as error:
        return str(error)
    return None


def forward(
    query_rows: Tensor,  # (B, Hq, R, D)
    key: Tensor,  # (B, Hkv, S, D)
    segments: Tensor,  # (B, S)
    row_positions: Tensor,  # (B, R)
    num_segments: int,
    tree_end: Tensor | None,  # (B, S)
    lse: Tensor | None,  # (B, Hq, R)
    scale: float,
    softcap: float | None,
    window: int | None,
    reduce: str | None,
) -> Tensor:
    """-> (B, Hq, R, N), (B, N) or (B, S), as `reduce` says; float32, or float64 where an input is float64.

    At most `torch.get_num_threads()` threads work. With `lse`, blocks of keys that are in no segment are not read.

    Raises:
        ValueError: a segment id or row position out of range, or MMDPO_CPU_LEVEL names no level this CPU runs.
    """
    native = _module()
    batch, heads, rows, dim = query_rows.shape
    length = key.shape[2]
    dtype = torch.promote_types(query_rows.dtype, key.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    query_rows, key = (_dense_heads(tensor.to(dtype)) for tensor in (query_rows, key))
    segments, row_positions = _int32(segments), _int32(row_positions)
    depths = None if tree_end is None or window is None else _int32(depth(tree_end))
    tree_end = None if tree_end is None else _int32(tree_end)
    lse = None if lse is None else lse.to(wide).contiguous()
    shape = {None: (batch, heads, rows, num_segments), "mean": (batch, num_segments), "tokens": (batch, length)}[reduce]
    out = torch.empty(shape, dtype=wide)
    native.attention_mass(
        sizes=(batch, heads, key.shape[1], rows, length, dim, num_segments),
        dtype=native.dtypes.index(DTYPES[dtype]),
        query=query_rows.data_ptr(),
        query_strides=query_rows.stride()[:3],
        key=key.data_ptr(),
        key_strides=key.stride()[:3],
        segments=segments.data_ptr(),
        row_positions=row_positions.data_ptr(),
        tree_end=_address(tree_end),
        depth=_address(depths),
        lse=_address(lse),
        scale=scale,
        softcap=softcap or 0.0,
        window=window or 0,
        reduce=native.reductions.index(reduce or "none"),
        num_threads=torch.get_num_threads(),
        out=out.data_ptr(),
    )
    return out


def _module() -> ModuleType:
    native = load()
    if isinstance(native, str):
        raise RuntimeError(f"attention_mass: {native}")
    return native


def _dense_heads(tensor: Tensor) -> Tensor:
    """The kernel reads each head vector as consecutive elements; other strides may be anything."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _int32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int32).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
