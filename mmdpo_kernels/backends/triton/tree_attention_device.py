"""Device functions that the kernels of `tree_attention` share: tiles in and out, the mask, probabilities, masses."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .arithmetic_device import narrow
from .attention_device import COLUMNS, offset, sees

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def load_tile(base, start, stride, length, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, EDGE: tl.constexpr):
    """Rows [start, start + ROWS) of a (S, DIM) matrix, zeros to its right and, with EDGE, below it -> [ROWS, WIDTH]."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    addresses = base + offset(start, stride) + (rows[:, None] * stride + columns[None, :])
    if EDGE and WIDTH != DIM:
        return tl.load(addresses, mask=(start + rows < length)[:, None] & (columns < DIM)[None, :], other=0.0)
    elif EDGE:
        return tl.load(addresses, mask=(start + rows < length)[:, None], other=0.0)
    elif WIDTH != DIM:
        return tl.load(addresses, mask=(columns < DIM)[None, :], other=0.0)
    else:
        return tl.load(addresses)


@triton.jit
def tile_source(
    base,
    heads,
    head_stride,
    stride,
    length,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """What `stream_tile` reads of (heads, S, DIM), or of (S, DIM) with heads None: the address, or a descriptor for the copy engine."""
    if DESCRIPTORS and heads is not None:
        return tl.make_tensor_descriptor(base, [heads, length, DIM], [head_stride, stride, 1], [1, ROWS, WIDTH])
    elif DESCRIPTORS:
        return tl.make_tensor_descriptor(base, [length, DIM], [stride, 1], [ROWS, WIDTH])
    else:
        return base


@triton.jit
def stream_tile(
    source,
    head,
    head_stride,
    start,
    stride,
    length,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    EDGE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """`load_tile` of a `tile_source`; a descriptor gives zeros beyond all edges, whatever EDGE says."""
    if DESCRIPTORS and head is not None:
        return source.load([head, start, 0]).reshape(ROWS, WIDTH)
    elif DESCRIPTORS:
        return source.load([start, 0])
    else:
        if head is not None:
            source += offset(head, head_stride)
        return load_tile(source, start, stride, length, ROWS, DIM, WIDTH, EDGE)


@triton.jit
def load_vector(base, at, length, EDGE: tl.constexpr):
    """Entries of a (S,) vector; zeros beyond S, where EDGE says that there may be any."""
    if EDGE:
        return tl.load(base + at, mask=at < length, other=0)
    else:
        return tl.load(base + at)


@triton.jit
def store_tile(base, tile, start, stride, length, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The part of a [ROWS, WIDTH] tile that lies in the (S, DIM) matrix."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    addresses = base + offset(start, stride) + (rows[:, None] * stride + columns[None, :])
    tl.store(addresses, narrow(tile, base.dtype.element_ty), mask=(start + rows < length)[:, None] & (columns < DIM)[None, :])


@triton.jit
def last_keys(rows, reach, length):
    """The last key within reach of each row; reach is (S,), or None: the row itself."""
    lasts = rows
    if reach is not None:
        lasts = tl.minimum(load_vector(reach, rows, length, True), length) - 1
    return lasts


@triton.jit
def seen_pairs(rows, lasts, keys, tree_end, depth, length, window):
    """Whether query `rows` sees `keys`, for [BM, 1] and [1, BN] or the transposed; tree_end and depth are (S,) or None."""
    ends = None
    if tree_end is not None:
        ends = load_vector(tree_end, keys, length, True)
    row_depths = rows
    key_depths = keys
    if window is not None and depth is not None:
        row_depths = load_vector(depth, rows, length, True)
        key_depths = load_vector(depth, keys, length, True)
    return sees(rows, lasts, keys, ends, row_depths, key_depths, window)


@triton.jit
def load_lse(lse, rows, length, EDGE: tl.constexpr):
    """With EDGE, +inf where nothing is seen and beyond S: every probability of such a row is then exp(-inf)."""
    row_lse = load_vector(lse, rows, length, EDGE)
    if EDGE:
        row_lse = tl.where((rows >= length) | (row_lse == float("-inf")), float("inf"), row_lse)
    return row_lse


@triton.jit
def probabilities(scores, outer, lse, WIDE: tl.constexpr):
    """exp(outer * scores - lse)."""
    if WIDE:
        # In float32 the rounding of a change of base before the subtraction would show.
        return tl.exp2((scores * outer - lse) * LOG2_E)
    else:
        return tl.exp2(scores * (outer * LOG2_E) - lse * LOG2_E)


@triton.jit
def load_one_hot(segments, keys, first_segment, length):
    """Which of 16 segments each key is in, zeros and ones in bfloat16, [BN, 16]."""
    ids = tl.load(segments + keys, mask=keys < length, other=-1)
    one_hot = ids[:, None] == first_segment + tl.arange(0, COLUMNS)[None, :]
    return narrow(one_hot.to(tl.float32), tl.bfloat16)


@triton.jit
def load_mass(mass, rows, first_segment, length, num_segments):
    """16 columns of a (S, N) mass or its gradient, zeros beyond the edges, [BM, 16]."""
    columns = first_segment + tl.arange(0, COLUMNS)
    addresses = mass + offset(rows, num_segments)[:, None] + columns[None, :]
    return tl.load(addresses, mask=(rows < length)[:, None] & (columns < num_segments)[None, :], other=0.0)
