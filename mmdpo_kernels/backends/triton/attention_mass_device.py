"""Device functions that the kernels of `attention_mass` share.

The query heads of one key head are packed into one list of rows, packed row p being query row `p // group` of head `p % group`, so that a
tile of rows reads its keys once. Rows stand at `row_positions` among the keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic_device import dot, tanh
from .attention_device import sees

SPLITS = tl.constexpr(16)
"""Parts that the keys of a row tile are cut into at most."""

SCAN = tl.constexpr(16)
"""Blocks whose need is settled together; their order is packed into 64 bits, 4 a block."""

FAR = tl.constexpr(2**31 - 1)


@triton.jit
def row_facts(row_positions, reach, depth, i_b, packed, num_rows, group, length):
    """-> position among the keys (-1 = unused), last key within reach (likewise) and depth of `packed` rows, in their shape."""
    row = packed // group
    position = tl.load(row_positions + i_b * num_rows + row, mask=row < num_rows, other=-1).to(tl.int32)
    position = tl.where(position < length, position, -1)
    last = position
    if reach is not None:
        last = tl.load(reach + i_b * length + position, mask=position >= 0, other=0).to(tl.int32) - 1
    row_depth = position
    if depth is not None:
        row_depth = tl.load(depth + i_b * length + position, mask=position >= 0, other=0).to(tl.int32)
    return position, last, row_depth


@triton.jit
def key_facts(tree_end, depth, i_b, keys, length):
    """-> tree end (0 past the last key, which nobody sees) and depth of `keys`, in their shape."""
    inside = keys < length
    end = tl.where(inside, length, 0)
    key_depth = keys
    if tree_end is not None:
        end = tl.load(tree_end + i_b * length + keys, mask=inside, other=0).to(tl.int32)
    if depth is not None:
        key_depth = tl.load(depth + i_b * length + keys, mask=inside, other=0).to(tl.int32)
    return end, key_depth


@triton.jit
def seen_tile(position, last, row_depth, keys, end, key_depth, window):
    """-> [BM, BN]"""
    return sees(position[:, None], last[:, None], keys[None, :], end[None, :], row_depth[:, None], key_depth[None, :], window)


@triton.jit
def row_range(position, last, row_depth):
    """-> first position, last key within reach and least depth of the used rows."""
    used = position >= 0
    first = tl.min(tl.where(used, position, FAR))
    least_depth = tl.min(tl.where(used, row_depth, FAR))
    return first, tl.max(last), least_depth


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
    tree_end,  # (B, S) or None
    depth,  # (B, S) or None
    segments,  # (B, S) or None
    i_b,
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
    end, key_depth = key_facts(tree_end, depth, i_b, keys, length)
    worth = (keys < stop) & (keys <= last) & (end > first)
    if window is not None:
        worth &= least_depth - key_depth < window
    if segments is not None:
        segment = tl.load(segments + i_b * length + keys, mask=keys < length, other=-1)
        worth &= (segment >= first_segment) & (segment < end_segment)
    return pack_order(worth)


@triton.jit
def row_tiles(
    row_positions,  # (B, R)
    reach,  # (B, S) or None
    depth,  # (B, S) or None
    i_b,
    start,
    keys,  # [BN]
    end,  # [BN]
    key_depth,  # [BN]
    num_rows,
    group,
    length,
    window,
    BLOCK_M: tl.constexpr,
):
    """Which of the SCAN row tiles from packed row `start` hold a row that may see one of `keys`."""
    packed = start + tl.arange(0, SCAN)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]  # [SCAN, BM]
    position, last, row_depth = row_facts(row_positions, reach, depth, i_b, packed, num_rows, group, length)
    worth = (last >= tl.min(keys)) & (position < tl.max(end))
    if window is not None:
        worth &= row_depth - tl.max(tl.where(keys < length, key_depth, -1)) < window
    return pack_order(worth)


@triton.jit
def head_vectors(addresses, inside, first, DIM: tl.constexpr, STEP_D: tl.constexpr):
    """-> [len(addresses), STEP_D] elements from `first`, zero outside."""
    columns = first + tl.arange(0, STEP_D)
    mask = inside[:, None]
    if DIM % STEP_D:
        mask = mask & (columns < DIM)[None, :]
    return tl.load(addresses[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def products(q, k, query_rows, used, key_rows, inside, DIM: tl.constexpr, STEP_D: tl.constexpr):
    """-> [BM, BN] q k', of whole head vectors, or read STEP_D elements at a time where whole ones would not fit into registers."""
    if STEP_D >= DIM:
        dots = dot(q, tl.trans(k))
    else:
        dots = tl.zeros([query_rows.shape[0], key_rows.shape[0]], tl.float32)
        for first in range(0, DIM, STEP_D):
            q_step = head_vectors(query_rows, used, first, DIM, STEP_D)
            k_step = head_vectors(key_rows, inside, first, DIM, STEP_D)
            dots = dot(q_step, tl.trans(k_step), dots)
    return dots


@triton.jit
def scores_of(dots, scale, softcap):
    """Dot products -> scores, natural and whole: the log-sum-exp that may be given is of these."""
    scores = dots * scale
    if softcap is not None:
        scores = softcap * tanh(scores / softcap)
    return scores


@triton.jit
def load_upstream(grad, at_row, index, used, inside, stride, PER_ROW: tl.constexpr):
    """-> gradient of each probability, [BM, BN], or [1, BN] where all rows share it; `index` is the key's segment, or the key itself."""
    if PER_ROW:
        grad_p = tl.load(grad + at_row[:, None] + index[None, :] * stride, mask=used[:, None] & inside[None, :], other=0.0)
    else:
        grad_p = tl.load(grad + index * stride, mask=inside, other=0.0)[None, :]
    return grad_p


@triton.jit
def row_weight(row_positions, i_b, num_rows, heads):
    """-> heads times used rows, at least 1."""
    count = tl.zeros([1024], tl.int32)
    for start in range(0, num_rows, 1024):
        row = start + tl.arange(0, 1024)
        count += (tl.load(row_positions + i_b * num_rows + row, mask=row < num_rows, other=-1) >= 0).to(tl.int32)
    return tl.maximum(tl.sum(count) * heads, 1).to(tl.float32)
