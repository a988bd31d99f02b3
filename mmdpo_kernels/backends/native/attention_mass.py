"""`attention_mass` in C++ on the CPU and in CUDA C++ on the GPU: scores live in tiles, and a group of heads reads its keys once.

The backward is C++ on the CPU. On CUDA tensors it is the Triton backend's, or where that cannot run the reference's: it is a few matrix products
of ordinary size, and CUDA C++ would do the same as Triton.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ...tree_mask import depth
from ..calls import AttentionMassCall
from ..layout import accumulation_dtype, dense_heads, int32
from ..registry import load as load_backend
from .extension import address, cuda_reason, load, module

OP = "attention_mass"

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}


def unavailable_reason(
    device_type: str, dtype: torch.dtype, *, head_dim: int = 64, num_segments: int = 0, **features: object
) -> str | None:
    """None, or why this backend cannot serve tensors of `dtype` on `device_type`."""
    native = load()
    if isinstance(native, str):
        return native
    if device_type not in ("cpu", "cuda"):
        return f"it runs on cpu and cuda tensors, got {device_type}"
    if dtype not in DTYPES:
        return f"it takes {', '.join(DTYPES.values())}, got {dtype}"
    if device_type == "cuda":
        if features.get("reach"):
            return "it has no reach on CUDA"
        return (
            cuda_reason(native)
            or native.attention_mass_cuda_unserved(native.dtypes.index(DTYPES[dtype]), head_dim, num_segments)
            or None
        )
    try:
        native.cpu_level()
    except ValueError as error:
        return str(error)
    return None


def forward(
    query_rows: Tensor,  # (B, Hq, R, D)
    key: Tensor,  # (B, Hkv, S, D)
    call: AttentionMassCall,
) -> Tensor:
    """-> (B, Hq, R, N), (B, N) or (B, S), as `reduce` says; float32, or float64 where an input is float64.

    On the CPU at most `torch.get_num_threads()` threads work. With `lse`, blocks of keys that are in no segment are not read.

    Raises:
        ValueError: MMDPO_CPU_LEVEL names no level this CPU runs. On the CPU also a segment id or row position out of range; on the GPU, where
            nobody can look without waiting, such ids count as none.
    """
    native = module(OP)
    given = _Given(native, query_rows, key, call)
    batch, heads, rows, _ = query_rows.shape
    count = call.num_segments
    shape = {None: (batch, heads, rows, count), "mean": (batch, count), "tokens": (batch, key.shape[2])}[call.reduce]
    out = torch.empty(shape, dtype=given.wide, device=key.device)
    if key.device.type == "cpu":
        native.attention_mass(given.args, num_threads=torch.get_num_threads(), out=out.data_ptr())
    else:
        _run_on_gpu(native, given.args, out)
    return out


def backward(
    grad: Tensor,
    query_rows: Tensor,
    key: Tensor,
    call: AttentionMassCall,
) -> tuple[Tensor, Tensor]:
    """-> gradients of query_rows and key; on CUDA tensors another backend's, see the module."""
    if key.device.type != "cpu":
        return _gpu_backward(key).backward(grad, query_rows, key, call)
    native = module(OP)
    given = _Given(native, query_rows, key, call)
    grad = grad.to(given.wide).contiguous()
    grad_query, grad_key = (torch.empty(tensor.shape, dtype=given.wide) for tensor in (query_rows, key))
    native.attention_mass_backward(
        given.args,
        num_threads=torch.get_num_threads(),
        grad=grad.data_ptr(),
        grad_query=grad_query.data_ptr(),
        grad_key=grad_key.data_ptr(),
    )
    return grad_query.to(query_rows.dtype), grad_key.to(key.dtype)


class _Given:
    """`args` of the C++ functions, and the tensors whose addresses are in it."""

    def __init__(self, native: ModuleType, query_rows: Tensor, key: Tensor, call: AttentionMassCall) -> None:
        dtype = torch.promote_types(query_rows.dtype, key.dtype)
        self.wide = accumulation_dtype(dtype)
        readable = dense_heads if key.device.type == "cpu" else _aligned_heads
        query_rows, key = (readable(tensor.to(dtype)) for tensor in (query_rows, key))
        depths = None if call.tree_end is None or call.window is None else depth(call.tree_end)
        ids = {"segments": call.segments, "row_positions": call.row_positions, "tree_end": call.tree_end, "reach": call.reach}
        ids = {name: int32(tensor) for name, tensor in {**ids, "depth": depths}.items()}
        lse = None if call.lse is None else call.lse.to(self.wide).contiguous()
        self._tensors = (query_rows, key, lse, *ids.values())
        batch, heads, rows, dim = query_rows.shape
        self.args = native.AttentionMassArgs(
            sizes=(batch, heads, key.shape[1], rows, key.shape[2], dim, call.num_segments),
            dtype=native.dtypes.index(DTYPES[dtype]),
            query=query_rows.data_ptr(),
            query_strides=query_rows.stride()[:3],
            key=key.data_ptr(),
            key_strides=key.stride()[:3],
            **{name: address(tensor) for name, tensor in ids.items()},
            lse=address(lse),
            scale=call.scale,
            softcap=call.softcap or 0.0,
            window=call.window or 0,
            reduce=native.reductions.index(call.reduce or "none"),
        )


def _run_on_gpu(native: ModuleType, args: object, out: Tensor) -> None:
    with torch.cuda.device(out.device):
        device = torch.cuda.current_device()
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        size = native.attention_mass_cuda_workspace_bytes(args, multiprocessors=multiprocessors)
        workspace = torch.empty(size, dtype=torch.uint8, device=out.device)
        native.attention_mass_cuda(
            args,
            device=device,
            multiprocessors=multiprocessors,
            stream=torch.cuda.current_stream().cuda_stream,
            workspace=workspace.data_ptr(),
            out=out.data_ptr(),
        )


def _gpu_backward(key: Tensor) -> ModuleType:
    triton = load_backend("attention_mass", "triton")
    serves = hasattr(triton, "backward") and triton.unavailable_reason(key.device.type, key.dtype) is None
    return triton if serves else load_backend("attention_mass", "reference")


def _aligned_heads(tensor: Tensor) -> Tensor:
    """The GPU reads head vectors 16 bytes at a time; where they do not start at multiples of 16, a copy's do."""
    size = tensor.element_size()
    starts = (tensor.data_ptr(), *(stride * size for stride in tensor.stride()[:3]))
    return (
        tensor
        if tensor.stride(-1) == 1 and all(start % 16 == 0 for start in starts)
        else tensor.clone(memory_format=torch.contiguous_format)
    )
