"""Kernels of `attention_mass`: rows against keys, keys against rows, sums of partial results; then the two gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import dot, dot_exact, narrow
from .attention_mass_tiles import (
    COLUMNS,
    SCAN,
    SPLITS,
    at_rank,
    capped,
    head_vectors,
    key_blocks,
    key_facts,
    products,
    reach,
    row_facts,
    row_tiles,
    row_weight,
    upstream,
    visible,
)


@triton.jit
def add_members(b_p, b_member, b_mass, DTYPE: tl.constexpr):
    """b_mass + p member, exact on tensor cores where the inputs went there too."""
    if DTYPE == tl.float32:  # noqa: SIM108, SIM300 - a ternary would not be settled at compile time
        b_mass = dot(b_p, b_member, b_mass)
    else:
        b_mass = dot_exact(b_p, b_member.to(tl.bfloat16), b_mass)
    return b_mass


@triton.jit
def row_partials(
    Q,
    K,
    SEGMENTS,
    POSITIONS,
    TREE_END,
    DEPTH,
    LSE,
    GRAD,
    PEAK,
    TOTAL,
    MASS,
    scale,
    softcap,
    window,
    rows,
    group,
    kv_heads,
    length,
    blocks,
    first_segment,
    end_segment,
    stride_qb,
    stride_qh,
    stride_qr,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_gb,
    stride_gh,
    stride_gr,
    stride_gn,
    stride_split,
    stride_row,
    WHAT: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    PER_ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP_D: tl.constexpr,
):
    """One row tile against `blocks` key blocks: running maximum, total, and by WHAT "mass" per segment or "gradient", sum of P dP.

    With LSE the probabilities are final: no maximum, no total, and blocks without any of the segments are not read.
    """
    i_t, i_s, i_b, i_h = tl.program_id(0), tl.program_id(1), tl.program_id(2) // kv_heads, tl.program_id(2) % kv_heads
    m = i_t * BLOCK_M + tl.arange(0, BLOCK_M)
    head = i_h * group + m % group
    flat = (i_b * kv_heads * group + head) * rows + m // group  # [BM] row of (B, Hq, R)
    i_wide = i_b.to(tl.int64)
    position, row_depth = row_facts(POSITIONS, DEPTH, i_b, m, rows, group, length)
    used = position >= 0
    first, last, least_depth = reach(position, row_depth)
    p_q = Q + i_wide * stride_qb + head.to(tl.int64) * stride_qh + (m // group).to(tl.int64) * stride_qr
    p_k = K + i_wide * stride_kb + i_h.to(tl.int64) * stride_kh
    b_q = None
    if STEP_D == BLOCK_D:
        b_q = head_vectors(p_q, used, 0, HEAD_DIM, BLOCK_D)  # [BM, BD]
    if LSE is None:
        b_peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    else:
        b_lse = tl.load(LSE + flat, mask=used, other=0.0)
        b_peak = tl.where(b_lse == float("-inf"), 0.0, b_lse)
    b_total = tl.zeros([BLOCK_M], tl.float32)
    b_mass = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    b_delta = tl.zeros([BLOCK_M], tl.float32)

    start = i_s * blocks * BLOCK_N
    stop = tl.minimum(start + blocks * BLOCK_N, length)
    for scan in range(start, stop, SCAN * BLOCK_N):
        if LSE is None:
            order, count = key_blocks(
                TREE_END, DEPTH, None, i_b, scan, stop, first, last, least_depth, length, window, 0, 0, BLOCK_N
            )
        else:
            order, count = key_blocks(
                TREE_END,
                DEPTH,
                SEGMENTS,
                i_b,
                scan,
                stop,
                first,
                last,
                least_depth,
                length,
                window,
                first_segment,
                end_segment,
                BLOCK_N,
            )
        for i in range(count):
            keys = scan + at_rank(order, i) * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = keys < length
            end, key_depth = key_facts(TREE_END, DEPTH, i_b, keys, length)
            p_keys = p_k + keys.to(tl.int64) * stride_ks
            b_k = None
            if STEP_D == BLOCK_D:
                b_k = head_vectors(p_keys, inside, 0, HEAD_DIM, BLOCK_D)  # [BN, BD]
            b_s = products(b_q, b_k, p_q, used, p_keys, inside, HEAD_DIM, STEP_D)  # [BM, BN]
            seen = visible(position, row_depth, keys, end, key_depth, window)
            b_s = tl.where(seen, capped(b_s, scale, softcap), float("-inf"))
            if LSE is None:
                b_higher = tl.maximum(b_peak, tl.max(b_s, 1))
                b_shift = tl.where(b_higher == float("-inf"), 0.0, b_higher)
                b_p = tl.exp(b_s - b_shift[:, None])
                b_fade = tl.exp(b_peak - b_shift)
                b_peak = b_higher
                b_total = b_total * b_fade + tl.sum(b_p, 1)
                if WHAT == "mass":
                    b_mass = b_mass * b_fade[:, None]
                if WHAT == "gradient":
                    b_delta = b_delta * b_fade
            else:
                # Rows that see nothing may come with any lse.
                b_p = tl.where(seen, tl.exp(b_s - b_peak[:, None]), 0.0)
            if WHAT != "lse":
                index = keys
                if SEGMENTS is not None:
                    index = tl.load(SEGMENTS + i_b * length + keys, mask=inside, other=-1).to(tl.int32)
            if WHAT == "mass":
                b_member = tl.where(index[:, None] == first_segment + tl.arange(0, COLUMNS)[None, :], 1.0, 0.0)  # [BN, 16]
                b_mass = add_members(b_p, b_member, b_mass, Q.dtype.element_ty)
            if WHAT == "gradient":
                member = inside & (index >= 0) & (index < end_segment)
                row_offset = head.to(tl.int64) * stride_gh + (m // group).to(tl.int64) * stride_gr
                b_dp = upstream(GRAD + i_wide * stride_gb, row_offset, index, used, member, stride_gn, PER_ROW)
                b_delta += tl.sum(b_p * b_dp, 1)

    listed = m < rows * group
    if LSE is None:
        tl.store(PEAK + i_s * stride_split + flat, b_peak, mask=listed)
        tl.store(TOTAL + i_s * stride_split + flat, b_total, mask=listed)
    if WHAT == "mass":
        column = tl.arange(0, COLUMNS)
        if SUM_ROWS:
            part = (tl.program_id(2) * tl.num_programs(0) + i_t) * tl.num_programs(1) + i_s
            tl.store(MASS + part * COLUMNS + column, tl.sum(b_mass, 0))
        else:
            at = i_s.to(tl.int64) * stride_split * stride_row + flat.to(tl.int64) * stride_row
            tl.store(
                MASS + at[:, None] + column[None, :],
                b_mass,
                mask=listed[:, None] & (column < end_segment - first_segment)[None, :],
            )
    if WHAT == "gradient":
        tl.store(MASS + i_s * stride_split + flat, b_delta, mask=listed)


@triton.jit
def split_lse(PEAK, TOTAL, flat, listed, num_rows, splits):
    """-> peak [BR], factor of each split [BR, SPLITS] and total [BR] of rows whose keys were split."""
    split = tl.arange(0, SPLITS)[None, :]
    at = split * num_rows + flat[:, None]
    mask = listed[:, None] & (split < splits)
    b_peaks = tl.load(PEAK + at, mask=mask, other=float("-inf"))
    b_peak = tl.max(b_peaks, 1)
    b_peak = tl.where(b_peak == float("-inf"), 0.0, b_peak)
    b_factor = tl.exp(b_peaks - b_peak[:, None])
    b_total = tl.sum(tl.load(TOTAL + at, mask=mask, other=0.0) * b_factor, 1)
    return b_peak, b_factor, b_total


@triton.jit
def combine_splits(
    PEAK,
    TOTAL,
    MASS,
    LSE,
    OUT,
    batch_rows,
    splits,
    num_columns,
    stride_out,
    SUM_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Add up what `row_partials` found of the same rows, for BLOCK_R rows of one batch row; without PEAK there is nothing to rescale."""
    i_t, i_b = tl.program_id(0), tl.program_id(1)
    row = i_t * BLOCK_R + tl.arange(0, BLOCK_R)
    listed = row < batch_rows
    flat = i_b * batch_rows + row
    num_rows = tl.num_programs(1) * batch_rows
    split = tl.arange(0, SPLITS)[None, :, None]
    column = tl.arange(0, WIDTH)[None, None, :]
    at = (split * num_rows + flat[:, None, None]).to(tl.int64) * WIDTH + column
    b_mass = tl.load(MASS + at, mask=listed[:, None, None] & (split < splits), other=0.0)  # [BR, SPLITS, COLUMNS]
    if PEAK is None:
        b_mass = tl.sum(b_mass, 1)
    else:
        b_peak, b_factor, b_total = split_lse(PEAK, TOTAL, flat, listed, num_rows, splits)
        b_total = tl.where(b_total == 0.0, 1.0, b_total)
        b_mass = tl.sum(b_mass * b_factor[:, :, None], 1) / b_total[:, None]
        if LSE is not None:
            tl.store(LSE + flat, b_peak + tl.log(b_total), mask=listed)
    column = tl.arange(0, WIDTH)
    if SUM_ROWS:
        b_sum = tl.sum(tl.where(listed[:, None], b_mass, 0.0), 0)
        tl.store(OUT + (i_b * tl.num_programs(0) + i_t) * WIDTH + column, b_sum)
    else:
        at = flat.to(tl.int64) * stride_out
        tl.store(OUT + at[:, None] + column[None, :], b_mass, mask=listed[:, None] & (column < num_columns)[None, :])


@triton.jit
def key_partials(
    Q,
    K,
    POSITIONS,
    TREE_END,
    DEPTH,
    LSE,
    PEAK,
    TOTAL,
    OUT,
    scale,
    softcap,
    window,
    rows,
    group,
    kv_heads,
    length,
    splits,
    stride_qb,
    stride_qh,
    stride_qr,
    stride_kb,
    stride_kh,
    stride_ks,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP_D: tl.constexpr,
):
    """Probability of one block of keys summed over the rows of its key head; lse known, or in the parts that `row_partials` left."""
    i_n, i_b, i_h = tl.program_id(0), tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    i_wide = i_b.to(tl.int64)
    keys = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = keys < length
    end, key_depth = key_facts(TREE_END, DEPTH, i_b, keys, length)
    p_k = K + i_wide * stride_kb + i_h.to(tl.int64) * stride_kh + keys.to(tl.int64) * stride_ks
    b_k = None
    if STEP_D == BLOCK_D:
        b_k = head_vectors(p_k, inside, 0, HEAD_DIM, BLOCK_D)  # [BN, BD]
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    for scan in range(0, rows * group, SCAN * BLOCK_M):
        order, count = row_tiles(POSITIONS, DEPTH, i_b, scan, keys, end, key_depth, rows, group, length, window, BLOCK_M)
        for i in range(count):
            m = scan + at_rank(order, i) * BLOCK_M + tl.arange(0, BLOCK_M)
            head = i_h * group + m % group
            flat = (i_b * kv_heads * group + head) * rows + m // group
            position, row_depth = row_facts(POSITIONS, DEPTH, i_b, m, rows, group, length)
            used = position >= 0
            p_q = Q + i_wide * stride_qb + head.to(tl.int64) * stride_qh + (m // group).to(tl.int64) * stride_qr
            b_q = None
            if STEP_D == BLOCK_D:
                b_q = head_vectors(p_q, used, 0, HEAD_DIM, BLOCK_D)  # [BM, BD]
            b_s = products(b_q, b_k, p_q, used, p_k, inside, HEAD_DIM, STEP_D)
            seen = visible(position, row_depth, keys, end, key_depth, window)
            if LSE is None:
                num_rows = tl.num_programs(1) * group * rows
                b_peak, _, b_total = split_lse(PEAK, TOTAL, flat, used, num_rows, splits)
                b_weight = 1.0 / tl.where(b_total == 0.0, 1.0, b_total)
                b_p = tl.exp(capped(b_s, scale, softcap) - b_peak[:, None]) * b_weight[:, None]
            else:
                b_lse = tl.load(LSE + flat, mask=used, other=0.0)
                b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse)
                b_p = tl.exp(capped(b_s, scale, softcap) - b_lse[:, None])
            b_sum += tl.sum(tl.where(seen, b_p, 0.0), 0)
    tl.store(OUT + tl.program_id(1) * length + keys, b_sum, mask=inside)


@triton.jit
def add_parts(
    PARTS, OUT, POSITIONS, rows, heads, parts, width, num_columns, stride_out, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """OUT[b, c] = sum over t of PARTS[b, t, c], divided by heads times used rows."""
    i_c, i_b = tl.program_id(0), tl.program_id(1)
    column = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    b_sum = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_T):
        part = start + tl.arange(0, BLOCK_T)
        at = (i_b * parts + part).to(tl.int64) * width
        mask = (part < parts)[:, None] & (column < num_columns)[None, :]
        b_sum += tl.load(PARTS + at[:, None] + column[None, :], mask=mask, other=0.0)
    b_mean = tl.sum(b_sum, 0) / row_weight(POSITIONS, i_b, rows, heads)
    tl.store(OUT + i_b.to(tl.int64) * stride_out + column, b_mean, mask=column < num_columns)


@triton.jit
def score_gradients(b_s, b_lse, b_delta, b_dp, seen, scale, softcap):
    """-> [BM, BN] gradient of q k'."""
    b_s = capped(b_s, scale, softcap)
    b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse)
    b_ds = tl.exp(b_s - b_lse[:, None]) * (b_dp - b_delta[:, None]) * scale
    if softcap is not None:
        b_ratio = b_s / softcap
        b_ds *= 1.0 - b_ratio * b_ratio
    return tl.where(seen, b_ds, 0.0)


@triton.jit
def gradient_product(b_ds, b_x, b_sum):
    """b_sum + ds x, with ds in the dtype of x where its exponent allows: gradients fall below float16's smallest number."""
    if b_x.dtype == tl.float16:
        b_sum = tl.dot(b_ds, b_x.to(tl.float32), b_sum, input_precision="tf32")
    else:
        b_sum = dot(narrow(b_ds, b_x.dtype), b_x, b_sum)
    return b_sum


@triton.jit
def query_gradient(
    Q,
    K,
    SEGMENTS,
    POSITIONS,
    TREE_END,
    DEPTH,
    LSE,
    DELTA,
    GRAD,
    DQ,
    scale,
    softcap,
    window,
    rows,
    group,
    kv_heads,
    length,
    end_segment,
    stride_qb,
    stride_qh,
    stride_qr,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_gb,
    stride_gh,
    stride_gr,
    stride_gn,
    PER_ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP_D: tl.constexpr,
    MEAN: tl.constexpr,
):
    """dQ of one row tile."""
    i_t, i_b, i_h = tl.program_id(0), tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    i_wide = i_b.to(tl.int64)
    m = i_t * BLOCK_M + tl.arange(0, BLOCK_M)
    head = i_h * group + m % group
    flat = (i_b * kv_heads * group + head) * rows + m // group
    position, row_depth = row_facts(POSITIONS, DEPTH, i_b, m, rows, group, length)
    used = position >= 0
    first, last, least_depth = reach(position, row_depth)
    p_q = Q + i_wide * stride_qb + head.to(tl.int64) * stride_qh + (m // group).to(tl.int64) * stride_qr
    p_k = K + i_wide * stride_kb + i_h.to(tl.int64) * stride_kh
    p_grad = GRAD + i_wide * stride_gb
    row_offset = head.to(tl.int64) * stride_gh + (m // group).to(tl.int64) * stride_gr
    b_q = None
    if STEP_D == BLOCK_D:
        b_q = head_vectors(p_q, used, 0, HEAD_DIM, BLOCK_D)  # [BM, BD]
    b_lse = tl.load(LSE + flat, mask=used, other=0.0)
    b_delta = tl.load(DELTA + flat, mask=used, other=0.0)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for scan in range(0, length, SCAN * BLOCK_N):
        order, count = key_blocks(
            TREE_END, DEPTH, None, i_b, scan, length, first, last, least_depth, length, window, 0, 0, BLOCK_N
        )
        for i in range(count):
            keys = scan + at_rank(order, i) * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = keys < length
            end, key_depth = key_facts(TREE_END, DEPTH, i_b, keys, length)
            p_keys = p_k + keys.to(tl.int64) * stride_ks
            b_k = head_vectors(p_keys, inside, 0, HEAD_DIM, BLOCK_D)  # [BN, BD]
            b_s = products(b_q, b_k, p_q, used, p_keys, inside, HEAD_DIM, STEP_D)
            seen = visible(position, row_depth, keys, end, key_depth, window)
            index = keys
            if SEGMENTS is not None:
                index = tl.load(SEGMENTS + i_b * length + keys, mask=inside, other=-1).to(tl.int32)
            b_dp = upstream(p_grad, row_offset, index, used, inside & (index >= 0) & (index < end_segment), stride_gn, PER_ROW)
            b_ds = score_gradients(b_s, b_lse, b_delta, b_dp, seen, scale, softcap)
            b_dq = gradient_product(b_ds, b_k, b_dq)
    if MEAN:
        b_dq /= row_weight(POSITIONS, i_b, rows, kv_heads * group)
    d = tl.arange(0, BLOCK_D)
    at = flat.to(tl.int64)[:, None] * HEAD_DIM + d[None, :]
    tl.store(DQ + at, narrow(b_dq, DQ.dtype.element_ty), mask=(m < rows * group)[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def key_gradient(
    Q,
    K,
    SEGMENTS,
    POSITIONS,
    TREE_END,
    DEPTH,
    LSE,
    DELTA,
    GRAD,
    DK,
    scale,
    softcap,
    window,
    rows,
    group,
    kv_heads,
    length,
    end_segment,
    stride_qb,
    stride_qh,
    stride_qr,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_gb,
    stride_gh,
    stride_gr,
    stride_gn,
    PER_ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP_D: tl.constexpr,
    MEAN: tl.constexpr,
):
    """dK of one block of keys: the packed rows bring the sum over the heads of a group along."""
    i_n, i_b, i_h = tl.program_id(0), tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    i_wide = i_b.to(tl.int64)
    keys = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = keys < length
    end, key_depth = key_facts(TREE_END, DEPTH, i_b, keys, length)
    p_k = K + i_wide * stride_kb + i_h.to(tl.int64) * stride_kh + keys.to(tl.int64) * stride_ks
    p_grad = GRAD + i_wide * stride_gb
    b_k = None
    if STEP_D == BLOCK_D:
        b_k = head_vectors(p_k, inside, 0, HEAD_DIM, BLOCK_D)  # [BN, BD]
    index = keys
    if SEGMENTS is not None:
        index = tl.load(SEGMENTS + i_b * length + keys, mask=inside, other=-1).to(tl.int32)
    member = inside & (index >= 0) & (index < end_segment)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for scan in range(0, rows * group, SCAN * BLOCK_M):
        order, count = row_tiles(POSITIONS, DEPTH, i_b, scan, keys, end, key_depth, rows, group, length, window, BLOCK_M)
        for i in range(count):
            m = scan + at_rank(order, i) * BLOCK_M + tl.arange(0, BLOCK_M)
            head = i_h * group + m % group
            flat = (i_b * kv_heads * group + head) * rows + m // group
            position, row_depth = row_facts(POSITIONS, DEPTH, i_b, m, rows, group, length)
            used = position >= 0
            p_q = Q + i_wide * stride_qb + head.to(tl.int64) * stride_qh + (m // group).to(tl.int64) * stride_qr
            b_q = head_vectors(p_q, used, 0, HEAD_DIM, BLOCK_D)  # [BM, BD]
            b_s = products(b_q, b_k, p_q, used, p_k, inside, HEAD_DIM, STEP_D)
            seen = visible(position, row_depth, keys, end, key_depth, window)
            row_offset = head.to(tl.int64) * stride_gh + (m // group).to(tl.int64) * stride_gr
            b_dp = upstream(p_grad, row_offset, index, used, member, stride_gn, PER_ROW)
            b_lse = tl.load(LSE + flat, mask=used, other=0.0)
            b_delta = tl.load(DELTA + flat, mask=used, other=0.0)
            b_ds = score_gradients(b_s, b_lse, b_delta, b_dp, seen, scale, softcap)
            b_dk = gradient_product(tl.trans(b_ds), b_q, b_dk)
    if MEAN:
        b_dk /= row_weight(POSITIONS, i_b, rows, kv_heads * group)
    d = tl.arange(0, BLOCK_D)
    at = (tl.program_id(1).to(tl.int64) * length + keys)[:, None] * HEAD_DIM + d[None, :]
    tl.store(DK + at, narrow(b_dk, DK.dtype.element_ty), mask=inside[:, None] & (d < HEAD_DIM)[None, :])
