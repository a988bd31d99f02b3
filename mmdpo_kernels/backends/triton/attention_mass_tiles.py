"""Device functions that the `attention_mass` kernels share.

The query heads of one key head are packed into one list of rows, row m being query row `m // group` of head `m % group`, so that a tile of
rows reads its keys once. Names: `b_` is a tile's values, capitals are addresses and compile-time constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import dot, tanh

COLUMNS = tl.constexpr(16)
"""Segments that one pass adds up: the narrowest tile that tensor cores take."""

SPLITS = tl.constexpr(16)
"""Parts that the keys of a row tile are cut into at most."""

SCAN = tl.constexpr(16)
"""Blocks whose need is settled together; their order is packed into 64 bits, 4 a block."""

FAR = tl.constexpr(2**31 - 1)


@triton.jit
def row_facts(POSITIONS, DEPTH, batch, m, rows, group, length):
    """-> position among the keys (-1 = unused) and depth of packed rows `m`, in its shape."""
    row = m // group
    position = tl.load(POSITIONS + batch * rows + row, mask=row < rows, other=-1).to(tl.int32)
    position = tl.where(position < length, position, -1)
    depth = position
    if DEPTH is not None:
        depth = tl.load(DEPTH + batch * length + position, mask=position >= 0, other=0).to(tl.int32)
    return position, depth


@triton.jit
def key_facts(TREE_END, DEPTH, batch, keys, length):
    """-> tree end (0 past the last key, which nobody sees) and depth of `keys`, in their shape."""
    inside = keys < length
    end = tl.where(inside, length, 0)
    depth = keys
    if TREE_END is not None:
        end = tl.load(TREE_END + batch * length + keys, mask=inside, other=0).to(tl.int32)
    if DEPTH is not None:
        depth = tl.load(DEPTH + batch * length + keys, mask=inside, other=0).to(tl.int32)
    return end, depth


@triton.jit
def visible(position, row_depth, keys, end, key_depth, window):
    """-> [BM, BN]"""
    seen = (keys[None, :] <= position[:, None]) & (position[:, None] < end[None, :])
    if window is not None:
        seen &= row_depth[:, None] - key_depth[None, :] < window
    return seen


@triton.jit
def reach(position, depth):
    """-> first and last position and least depth of the used rows."""
    used = position >= 0
    first = tl.min(tl.where(used, position, FAR))
    least_depth = tl.min(tl.where(used, depth, FAR))
    return first, tl.max(position), least_depth


@triton.jit
def pack_order(worth):  # [SCAN, BLOCK]
    """-> indices of the blocks with anything worth reading, 4 bits each from the lowest up, and their number.

    A loop over this list has no branch around its loads, so they are fetched ahead.
    """
    needed = tl.max(worth.to(tl.int32), 1)
    rank = tl.cumsum(needed, 0) - needed
    index = tl.arange(0, SCAN).to(tl.int64)
    return tl.sum(tl.where(needed > 0, index << (4 * rank).to(tl.int64), 0)), tl.sum(needed)


@triton.jit
def at_rank(order, i):
    return ((order >> (4 * i)) & 15).to(tl.int32)


@triton.jit
def key_blocks(
    TREE_END,
    DEPTH,
    SEGMENTS,
    batch,
    start,
    stop,
    first,
    last,
    least_depth,
    length,
    window,
    first_segment,
    end_segment,
    BLOCK_N: tl.constexpr,
):
    """Which of the SCAN blocks from `start` hold a key below `stop` that a row may see and, given segments, that is in one of them."""
    keys = start + tl.arange(0, SCAN)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # [SCAN, BN]
    end, depth = key_facts(TREE_END, DEPTH, batch, keys, length)
    worth = (keys < stop) & (keys <= last) & (end > first)
    if window is not None:
        worth &= least_depth - depth < window
    if SEGMENTS is not None:
        segment = tl.load(SEGMENTS + batch * length + keys, mask=keys < length, other=-1)
        worth &= (segment >= first_segment) & (segment < end_segment)
    return pack_order(worth)


@triton.jit
def row_tiles(POSITIONS, DEPTH, batch, start, keys, end, key_depth, rows, group, length, window, BLOCK_M: tl.constexpr):
    """Which of the SCAN row tiles from packed row `start` hold a row that may see one of `keys`."""
    m = start + tl.arange(0, SCAN)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]  # [SCAN, BM]
    position, depth = row_facts(POSITIONS, DEPTH, batch, m, rows, group, length)
    worth = (position >= tl.min(keys)) & (position < tl.max(end))
    if window is not None:
        worth &= depth - tl.max(tl.where(keys < length, key_depth, -1)) < window
    return pack_order(worth)


@triton.jit
def head_vectors(pointers, inside, first, HEAD_DIM: tl.constexpr, STEP_D: tl.constexpr):
    """-> [len(pointers), STEP_D] elements from `first`, zero outside."""
    d = first + tl.arange(0, STEP_D)
    mask = inside[:, None]
    if HEAD_DIM % STEP_D:
        mask = mask & (d < HEAD_DIM)[None, :]
    return tl.load(pointers[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def products(b_q, b_k, p_q, used, p_k, inside, HEAD_DIM: tl.constexpr, STEP_D: tl.constexpr):
    """-> [BM, BN] q k', of whole head vectors, or read STEP_D elements at a time where whole ones would not fit into registers."""
    if STEP_D >= HEAD_DIM:
        b_s = dot(b_q, tl.trans(b_k))
    else:
        b_s = tl.zeros([p_q.shape[0], p_k.shape[0]], tl.float32)
        for first in range(0, HEAD_DIM, STEP_D):
            b_q_step = head_vectors(p_q, used, first, HEAD_DIM, STEP_D)
            b_k_step = head_vectors(p_k, inside, first, HEAD_DIM, STEP_D)
            b_s = dot(b_q_step, tl.trans(b_k_step), b_s)
    return b_s


@triton.jit
def capped(b_s, scale, softcap):
    b_s = b_s * scale
    if softcap is not None:
        b_s = softcap * tanh(b_s / softcap)
    return b_s


@triton.jit
def upstream(GRAD, row_offset, index, used, inside, stride, PER_ROW: tl.constexpr):
    """-> gradient of each probability, [BM, BN], or [1, BN] where all rows share it; `index` is the key's segment, or the key itself."""
    if PER_ROW:
        b_dp = tl.load(GRAD + row_offset[:, None] + index[None, :] * stride, mask=used[:, None] & inside[None, :], other=0.0)
    else:
        b_dp = tl.load(GRAD + index * stride, mask=inside, other=0.0)[None, :]
    return b_dp


@triton.jit
def row_weight(POSITIONS, batch, rows, heads):
    """-> heads times used rows, at least 1."""
    count = tl.zeros([1024], tl.int32)
    for start in range(0, rows, 1024):
        row = start + tl.arange(0, 1024)
        count += (tl.load(POSITIONS + batch * rows + row, mask=row < rows, other=-1) >= 0).to(tl.int32)
    return tl.maximum(tl.sum(count) * heads, 1).to(tl.float32)
