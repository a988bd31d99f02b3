"""`tree_attention` by PyTorch's FlexAttention: the tree rule as its mask, softcap as its score function.

FlexAttention has no backward that can be called on its own, so `backward` runs its forward again and differentiates it: one forward more
than a kernel of one's own costs. On a GPU it is compiled at first use; uncompiled, on the CPU, it builds all S x S scores and is there to be
checked, forward only, and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.config  # the config of a module that is otherwise imported late
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from ...tree_mask import PlanCache, depth
from ..calls import TreeAttentionCall
from ..layout import accumulation_dtype

LSE_GRADIENT = True

_BLOCK = 128
"""FlexAttention's own block size."""


def unavailable_reason(device_type: str, dtype: torch.dtype, *, head_dim: int = 64, **features: object) -> str | None:
    """Why this backend cannot serve the call, or None."""
    if features.get("mass"):
        return "FlexAttention returns no per-segment mass"
    if device_type == "cpu":
        return "PyTorch's FlexAttention has no backward on the CPU" if features.get("gradient") else None
    if device_type != "cuda":
        return f"it runs on cuda and cpu tensors, got {device_type}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it takes float16, bfloat16 and float32 on CUDA, got {dtype}"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or newer, this one has {torch.cuda.get_device_capability()}"
    if head_dim < 16:
        return f"it takes head dims from 16 on CUDA, got {head_dim}"
    return None


def forward(
    query: Tensor,  # (B, Hq, S, D)
    key: Tensor,  # (B, Hkv, S, D)
    value: Tensor,  # (B, Hkv, S, Dv)
    call: TreeAttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> output (B, Hq, S, Dv), lse (B, Hq, S), mass (B, Hq, S, 0)."""
    batch, heads, length, _ = query.shape
    wide = accumulation_dtype(query.dtype)
    mass = query.new_empty(batch, heads, length, 0, dtype=wide)
    if query.numel() == 0:
        return query.new_empty(batch, heads, length, value.shape[-1]), query.new_empty(batch, heads, length, dtype=wide), mass
    inputs = (tensor.detach() for tensor in (query, key, value))
    return *_attention(*inputs, call=call), mass


def backward(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    grad_mass: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    call: TreeAttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of query, key, value, through output and lse."""
    inputs = query, key, value
    if query.numel() == 0 or (grad_output is None and grad_lse is None):
        grads = tuple(torch.zeros_like(tensor) for tensor in inputs)
    else:
        with torch.enable_grad():
            leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
            found = _attention(*leaves, call=call)
            through = [(result, grad) for result, grad in zip(found, (grad_output, grad_lse), strict=True) if grad is not None]
            grads = torch.autograd.grad(
                [result for result, _ in through], leaves, [grad for _, grad in through], materialize_grads=True
            )
    return grads[0], grads[1], grads[2]


def _attention(query: Tensor, key: Tensor, value: Tensor, *, call: TreeAttentionCall) -> tuple[Tensor, Tensor]:
    batch, _, length, _ = query.shape
    mask = _mask_of(call, batch, length, query.device)
    on_gpu = query.device.type == "cuda"
    # As a symbol, a second scale would meet an error of PyTorch's tracer; it is a constant of a model anyway. Beyond the limit PyTorch would
    # run uncompiled without a word, with all S x S scores; every dtype, and each with and without gradients, is a kind of call of its own.
    with torch._dynamo.config.patch(specialize_float=True, recompile_limit=64):
        output, aux = _attend(on_gpu)(
            query,
            key,
            value,
            score_mod=None if call.softcap is None else _softcap(call.softcap),
            block_mask=mask,
            scale=call.scale,
            enable_gqa=True,
            return_aux=AuxRequest(lse=True),
            # Whatever PyTorch is set to elsewhere, float32 is float32 here.
            kernel_options={"FLOAT32_PRECISION": "'ieee'"} if on_gpu else None,
        )
    return output, aux.lse


@functools.cache
def _attend(compiled: bool) -> Any:
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


@functools.cache
def _softcap(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def _mask_of(call: TreeAttentionCall, batch: int, length: int, device: torch.device) -> BlockMask:
    if call.reach is not None:
        return _reach_mask(call.reach, call.tree_end, call.window)
    if call.tree_end is not None:
        return _tree_mask(call.tree_end, call.window)
    return _causal_mask(batch, length, call.window, device)


@functools.lru_cache(maxsize=8)
def _causal_mask(batch: int, length: int, window: int | None, device: torch.device) -> BlockMask:
    return _block_mask(torch.full((batch, length), length, dtype=torch.int32, device=device), window)


def _block_mask(tree_end: Tensor, window: int | None, reach: Tensor | None = None) -> BlockMask:
    """(B, S) -> which blocks of scores are empty, partly seen or fully seen, from the ends of nodes and reach alone; nothing S x S is built.

    A block that may be partly seen is looked at element by element, so calling one partly seen is never wrong.
    """
    batch, length = tree_end.shape
    device = tree_end.device
    tokens = torch.arange(length, device=device, dtype=torch.int32)
    ends = tree_end.to(torch.int32, copy=True)
    depths = depth(ends).to(torch.int32)
    seen = ends > tokens
    num_blocks = -(-length // _BLOCK)
    first = torch.arange(num_blocks, device=device, dtype=torch.int32) * _BLOCK
    last = first + _BLOCK - 1
    # Of each block: (B, blocks, 1) as queries, (B, 1, blocks) as keys.
    latest_end = _per_block(ends.where(seen, -1), -1, largest=True)[:, None, :]
    earliest_end = _per_block(ends, -1, largest=False)[:, None, :]
    query_first, query_last = first[:, None], last[:, None]
    # The last block may be ragged, as queries and as keys.
    stops = None if reach is None else reach.to(torch.int32, copy=True)
    if stops is None:
        starts_seen, all_seen = first <= query_last, last < query_first
    else:
        starts_seen = first < _per_block(stops, 0, largest=True)[:, :, None]
        all_seen = (last < _per_block(stops, 0, largest=False)[:, :, None]) & (last < length)
    some = starts_seen & (latest_end > query_first)
    every = all_seen & (earliest_end > query_last) & (query_last < length)
    if window is not None:
        far = torch.iinfo(torch.int32).max // 2
        shallowest, deepest = _per_block(depths, far, largest=False), _per_block(depths, -far, largest=True)
        some &= shallowest[:, :, None] - _per_block(depths.where(seen, -far), -far, largest=True)[:, None, :] < window
        every &= deepest[:, :, None] - shallowest[:, None, :] < window
    partly = _ordered(some & ~every)
    full = _ordered(some & every)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        visible = (k <= q if stops is None else k < stops[b, q]) & (q < ends[b, k])
        return visible if window is None else visible & (depths[b, q] - depths[b, k] < window)

    return BlockMask.from_kv_blocks(*partly, *full, BLOCK_SIZE=_BLOCK, mask_mod=mask_mod, seq_lengths=(length, length))


def _per_block(values: Tensor, filler: int, *, largest: bool) -> Tensor:
    """(B, S) -> (B, blocks): the largest or smallest of each block."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % _BLOCK), value=filler)
    blocks = padded.unflatten(1, (-1, _BLOCK))
    return blocks.amax(2) if largest else blocks.amin(2)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(B, query blocks, key blocks) bool -> per query block how many key blocks, (B, 1, blocks), and which, these first."""
    which = torch.argsort(blocks.to(torch.int32), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], which.to(torch.int32)[:, None]


_tree_mask = PlanCache(_block_mask)


def _block_mask_with_reach(reach: Tensor, tree_end: Tensor | None, window: int | None) -> BlockMask:
    return _block_mask(torch.full_like(reach, reach.shape[1]) if tree_end is None else tree_end, window, reach)


_reach_mask = PlanCache(_block_mask_with_reach)
