"""Kernels of `attention_mass`: rows against keys, keys against rows, sums of partial results; then the two gradients.

BM packed rows by BN keys are one step of every loop, see `attention_mass_device`; R query rows of G heads a key head are packed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic_device import dot, dot_exact, narrow, tanh_slope
from .attention_device import COLUMNS, offset
from .attention_mass_device import (
    SCAN,
    SPLITS,
    at_rank,
    head_vectors,
    key_blocks,
    key_facts,
    load_upstream,
    products,
    row_facts,
    row_range,
    row_tiles,
    row_weight,
    scores_of,
    seen_tile,
)


@triton.jit
def add_members(p, one_hot, acc_mass, DTYPE: tl.constexpr):
    """acc_mass + p one_hot, exact on tensor cores where the inputs went there too."""
    if DTYPE == tl.float32:  # noqa: SIM108, SIM300 - a ternary would not be settled at compile time
        acc_mass = dot(p, one_hot, acc_mass)
    else:
        acc_mass = dot_exact(p, one_hot.to(tl.bfloat16), acc_mass)
    return acc_mass


@triton.jit
def row_partials_kernel(
    query,  # (B, Hq, R, D)
    key,  # (B, Hkv, S, D)
    segments,  # (B, S); None: each key is its own
    row_positions,  # (B, R)
    tree_end,  # (B, S); None: causal
    reach,  # (B, S); None: to the row itself
    depth,  # (B, S); None: window counts packed indices
    lse,  # (B, Hq, R); None: not known
    grad,  # strided over (B, Hq, R, N or S); None but for "gradient"
    split_max,  # (splits, B, Hq, R); None with lse
    split_sum,  # (splits, B, Hq, R); None with lse
    mass,  # (splits, B, Hq, R, 16), or as SUM_ROWS and WHAT say
    scale,
    softcap,
    window,
    num_rows,
    group,
    kv_heads,
    length,
    blocks,  # a split
    first_segment,
    end_segment,
    query_b,
    query_h,
    query_r,
    key_b,
    key_h,
    key_s,
    grad_b,
    grad_h,
    grad_r,
    grad_n,
    split_stride,
    row_stride,
    WHAT: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    PER_ROW: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP_D: tl.constexpr,
):
    """One row tile against `blocks` key blocks: running maximum, sum, and by WHAT "mass" per segment or "gradient", sum of P dP.

    With lse the probabilities are final: no maximum, no sum, and blocks without any of the segments are not read.
    """
    i_t, i_s, i_b, i_h = tl.program_id(0), tl.program_id(1), tl.program_id(2) // kv_heads, tl.program_id(2) % kv_heads
    packed = i_t * BLOCK_M + tl.arange(0, BLOCK_M)
    head = i_h * group + packed % group
    flat = (i_b * kv_heads * group + head) * num_rows + packed // group  # [BM] row of (B, Hq, R)
    position, last, row_depth = row_facts(row_positions, reach, depth, i_b, packed, num_rows, group, length)
    used = position >= 0
    first, until, least_depth = row_range(position, last, row_depth)
    query_rows = query + offset(i_b, query_b) + offset(head, query_h) + offset(packed // group, query_r)
    key = key + offset(i_b, key_b) + offset(i_h, key_h)
    q = None
    if STEP_D == BLOCK_D:
        q = head_vectors(query_rows, used, 0, DIM, BLOCK_D)  # [BM, BD]
    if lse is None:
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    else:
        row_lse = tl.load(lse + flat, mask=used, other=0.0)
        row_max = tl.where(row_lse == float("-inf"), 0.0, row_lse)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc_mass = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    taken = tl.zeros([BLOCK_M], tl.float32)

    start = i_s * blocks * BLOCK_N
    stop = tl.minimum(start + blocks * BLOCK_N, length)
    for scan in range(start, stop, SCAN * BLOCK_N):
        if lse is None:
            order, count = key_blocks(
                tree_end, depth, None, i_b, scan, stop, first, until, least_depth, length, window, 0, 0, BLOCK_N
            )
        else:
            order, count = key_blocks(
                tree_end,
                depth,
                segments,
                i_b,
                scan,
                stop,
                first,
                until,
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
            end, key_depth = key_facts(tree_end, depth, i_b, keys, length)
            key_rows = key + offset(keys, key_s)
            k = None
            if STEP_D == BLOCK_D:
                k = head_vectors(key_rows, inside, 0, DIM, BLOCK_D)  # [BN, BD]
            scores = products(q, k, query_rows, used, key_rows, inside, DIM, STEP_D)  # [BM, BN]
            seen = seen_tile(position, last, row_depth, keys, end, key_depth, window)
            scores = tl.where(seen, scores_of(scores, scale, softcap), float("-inf"))
            if lse is None:
                new_max = tl.maximum(row_max, tl.max(scores, 1))
                shift = tl.where(new_max == float("-inf"), 0.0, new_max)
                p = tl.exp(scores - shift[:, None])
                decay = tl.exp(row_max - shift)
                row_max = new_max
                row_sum = row_sum * decay + tl.sum(p, 1)
                if WHAT == "mass":
                    acc_mass = acc_mass * decay[:, None]
                if WHAT == "gradient":
                    taken = taken * decay
            else:
                # Rows that see nothing may come with any lse.
                p = tl.where(seen, tl.exp(scores - row_max[:, None]), 0.0)
            if WHAT != "lse":
                index = keys
                if segments is not None:
                    index = tl.load(segments + i_b * length + keys, mask=inside, other=-1).to(tl.int32)
            if WHAT == "mass":
                one_hot = tl.where(index[:, None] == first_segment + tl.arange(0, COLUMNS)[None, :], 1.0, 0.0)  # [BN, 16]
                acc_mass = add_members(p, one_hot, acc_mass, query.dtype.element_ty)
            if WHAT == "gradient":
                member = inside & (index >= 0) & (index < end_segment)
                at_row = offset(head, grad_h) + offset(packed // group, grad_r)
                grad_p = load_upstream(grad + offset(i_b, grad_b), at_row, index, used, member, grad_n, PER_ROW)
                taken += tl.sum(p * grad_p, 1)

    listed = packed < num_rows * group
    if lse is None:
        tl.store(split_max + i_s * split_stride + flat, row_max, mask=listed)
        tl.store(split_sum + i_s * split_stride + flat, row_sum, mask=listed)
    if WHAT == "mass":
        column = tl.arange(0, COLUMNS)
        if SUM_ROWS:
            part = (tl.program_id(2) * tl.num_programs(0) + i_t) * tl.num_programs(1) + i_s
            tl.store(mass + part * COLUMNS + column, tl.sum(acc_mass, 0))
        else:
            at = offset(i_s, split_stride) * row_stride + offset(flat, row_stride)
            tl.store(
                mass + at[:, None] + column[None, :],
                acc_mass,
                mask=listed[:, None] & (column < end_segment - first_segment)[None, :],
            )
    if WHAT == "gradient":
        tl.store(mass + i_s * split_stride + flat, taken, mask=listed)


@triton.jit
def split_lse(split_max, split_sum, flat, listed, total_rows, splits):
    """-> maximum [BR], factor of each split [BR, SPLITS] and sum [BR] of rows whose keys were split."""
    split = tl.arange(0, SPLITS)[None, :]
    at = split * total_rows + flat[:, None]
    mask = listed[:, None] & (split < splits)
    maxima = tl.load(split_max + at, mask=mask, other=float("-inf"))
    row_max = tl.max(maxima, 1)
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    factor = tl.exp(maxima - row_max[:, None])
    row_sum = tl.sum(tl.load(split_sum + at, mask=mask, other=0.0) * factor, 1)
    return row_max, factor, row_sum


@triton.jit
def combine_splits_kernel(
    split_max,  # (splits, B, Hq, R); None: nothing to rescale
    split_sum,  # (splits, B, Hq, R)
    mass,  # (splits, B, Hq, R, WIDTH)
    lse,  # (B, Hq, R); None: not wanted
    output,  # (B, Hq, R, columns), or with SUM_ROWS (B, tiles, WIDTH)
    batch_rows,  # Hq R
    splits,
    num_columns,
    output_stride,
    SUM_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Add up what `row_partials_kernel` found of the same rows, for BLOCK_R rows of one batch row."""
    i_t, i_b = tl.program_id(0), tl.program_id(1)
    row = i_t * BLOCK_R + tl.arange(0, BLOCK_R)
    listed = row < batch_rows
    flat = i_b * batch_rows + row
    total_rows = tl.num_programs(1) * batch_rows
    split = tl.arange(0, SPLITS)[None, :, None]
    column = tl.arange(0, WIDTH)[None, None, :]
    at = offset(split * total_rows + flat[:, None, None], WIDTH) + column
    acc_mass = tl.load(mass + at, mask=listed[:, None, None] & (split < splits), other=0.0)  # [BR, SPLITS, COLUMNS]
    if split_max is None:
        acc_mass = tl.sum(acc_mass, 1)
    else:
        row_max, factor, row_sum = split_lse(split_max, split_sum, flat, listed, total_rows, splits)
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
        acc_mass = tl.sum(acc_mass * factor[:, :, None], 1) / row_sum[:, None]
        if lse is not None:
            tl.store(lse + flat, row_max + tl.log(row_sum), mask=listed)
    column = tl.arange(0, WIDTH)
    if SUM_ROWS:
        acc = tl.sum(tl.where(listed[:, None], acc_mass, 0.0), 0)
        tl.store(output + (i_b * tl.num_programs(0) + i_t) * WIDTH + column, acc)
    else:
        at = offset(flat, output_stride)
        tl.store(output + at[:, None] + column[None, :], acc_mass, mask=listed[:, None] & (column < num_columns)[None, :])


@triton.jit
def key_partials_kernel(
    query,  # (B, Hq, R, D)
    key,  # (B, Hkv, S, D)
    row_positions,  # (B, R)
    tree_end,  # (B, S); None: causal
    reach,  # (B, S); None: to the row itself
    depth,  # (B, S); None: window counts packed indices
    lse,  # (B, Hq, R); None: not known
    split_max,  # (splits, B, Hq, R); None with lse
    split_sum,  # (splits, B, Hq, R); None with lse
    output,  # (B, Hkv, S)
    scale,
    softcap,
    window,
    num_rows,
    group,
    kv_heads,
    length,
    splits,
    query_b,
    query_h,
    query_r,
    key_b,
    key_h,
    key_s,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP_D: tl.constexpr,
):
    """Probability of one block of keys summed over the rows of its key head; lse known, or in the parts that `row_partials_kernel` left."""
    i_n, i_b, i_h = tl.program_id(0), tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    keys = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = keys < length
    end, key_depth = key_facts(tree_end, depth, i_b, keys, length)
    key_rows = key + offset(i_b, key_b) + offset(i_h, key_h) + offset(keys, key_s)
    k = None
    if STEP_D == BLOCK_D:
        k = head_vectors(key_rows, inside, 0, DIM, BLOCK_D)  # [BN, BD]
    acc = tl.zeros([BLOCK_N], tl.float32)
    for scan in range(0, num_rows * group, SCAN * BLOCK_M):
        order, count = row_tiles(
            row_positions, reach, depth, i_b, scan, keys, end, key_depth, num_rows, group, length, window, BLOCK_M
        )
        for i in range(count):
            packed = scan + at_rank(order, i) * BLOCK_M + tl.arange(0, BLOCK_M)
            head = i_h * group + packed % group
            flat = (i_b * kv_heads * group + head) * num_rows + packed // group
            position, last, row_depth = row_facts(row_positions, reach, depth, i_b, packed, num_rows, group, length)
            used = position >= 0
            query_rows = query + offset(i_b, query_b) + offset(head, query_h) + offset(packed // group, query_r)
            q = None
            if STEP_D == BLOCK_D:
                q = head_vectors(query_rows, used, 0, DIM, BLOCK_D)  # [BM, BD]
            scores = products(q, k, query_rows, used, key_rows, inside, DIM, STEP_D)
            seen = seen_tile(position, last, row_depth, keys, end, key_depth, window)
            if lse is None:
                total_rows = tl.num_programs(1) * group * num_rows
                row_max, _, row_sum = split_lse(split_max, split_sum, flat, used, total_rows, splits)
                share = 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)
                p = tl.exp(scores_of(scores, scale, softcap) - row_max[:, None]) * share[:, None]
            else:
                row_lse = tl.load(lse + flat, mask=used, other=0.0)
                row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)
                p = tl.exp(scores_of(scores, scale, softcap) - row_lse[:, None])
            acc += tl.sum(tl.where(seen, p, 0.0), 0)
    tl.store(output + tl.program_id(1) * length + keys, acc, mask=inside)


@triton.jit
def add_parts_kernel(
    parts,  # (B, T, width)
    output,  # (B, columns)
    row_positions,  # (B, R)
    num_rows,
    heads,
    num_parts,
    width,
    num_columns,
    output_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """output[b, c] = sum over t of parts[b, t, c], divided by heads times used rows."""
    i_c, i_b = tl.program_id(0), tl.program_id(1)
    column = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for start in range(0, num_parts, BLOCK_T):
        part = start + tl.arange(0, BLOCK_T)
        at = offset(i_b * num_parts + part, width)
        mask = (part < num_parts)[:, None] & (column < num_columns)[None, :]
        acc += tl.load(parts + at[:, None] + column[None, :], mask=mask, other=0.0)
    mean = tl.sum(acc, 0) / row_weight(row_positions, i_b, num_rows, heads)
    tl.store(output + offset(i_b, output_stride) + column, mean, mask=column < num_columns)


@triton.jit
def score_gradients(scores, row_lse, taken, grad_p, seen, scale, softcap):
    """-> [BM, BN] gradient of q k'."""
    scores = scores_of(scores, scale, softcap)
    row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)
    grad_scores = tl.exp(scores - row_lse[:, None]) * (grad_p - taken[:, None]) * scale
    if softcap is not None:
        grad_scores *= tanh_slope(scores / softcap)
    return tl.where(seen, grad_scores, 0.0)


@triton.jit
def gradient_product(grad_scores, x, acc):
    """acc + grad_scores x, with grad_scores in the dtype of x where its exponent allows: gradients fall below float16's smallest number."""
    if x.dtype == tl.float16:
        acc = tl.dot(grad_scores, x.to(tl.float32), acc, input_precision="tf32")
    else:
        acc = dot(narrow(grad_scores, x.dtype), x, acc)
    return acc


@triton.jit
def grad_query_kernel(
    query,  # (B, Hq, R, D)
    key,  # (B, Hkv, S, D)
    segments,  # (B, S); None: each key is its own
    row_positions,  # (B, R)
    tree_end,  # (B, S); None: causal
    reach,  # (B, S); None: to the row itself
    depth,  # (B, S); None: window counts packed indices
    lse,  # (B, Hq, R)
    correction,  # (B, Hq, R) rowsum(P dP)
    grad,  # strided over (B, Hq, R, N or S)
    grad_query,  # (B, Hq, R, D)
    scale,
    softcap,
    window,
    num_rows,
    group,
    kv_heads,
    length,
    end_segment,
    query_b,
    query_h,
    query_r,
    key_b,
    key_h,
    key_s,
    grad_b,
    grad_h,
    grad_r,
    grad_n,
    PER_ROW: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP_D: tl.constexpr,
    MEAN: tl.constexpr,
):
    """The gradient of one row tile."""
    i_t, i_b, i_h = tl.program_id(0), tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    packed = i_t * BLOCK_M + tl.arange(0, BLOCK_M)
    head = i_h * group + packed % group
    flat = (i_b * kv_heads * group + head) * num_rows + packed // group
    position, last, row_depth = row_facts(row_positions, reach, depth, i_b, packed, num_rows, group, length)
    used = position >= 0
    first, until, least_depth = row_range(position, last, row_depth)
    query_rows = query + offset(i_b, query_b) + offset(head, query_h) + offset(packed // group, query_r)
    key = key + offset(i_b, key_b) + offset(i_h, key_h)
    grad += offset(i_b, grad_b)
    at_row = offset(head, grad_h) + offset(packed // group, grad_r)
    q = None
    if STEP_D == BLOCK_D:
        q = head_vectors(query_rows, used, 0, DIM, BLOCK_D)  # [BM, BD]
    row_lse = tl.load(lse + flat, mask=used, other=0.0)
    taken = tl.load(correction + flat, mask=used, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for scan in range(0, length, SCAN * BLOCK_N):
        order, count = key_blocks(
            tree_end, depth, None, i_b, scan, length, first, until, least_depth, length, window, 0, 0, BLOCK_N
        )
        for i in range(count):
            keys = scan + at_rank(order, i) * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = keys < length
            end, key_depth = key_facts(tree_end, depth, i_b, keys, length)
            key_rows = key + offset(keys, key_s)
            k = head_vectors(key_rows, inside, 0, DIM, BLOCK_D)  # [BN, BD]
            scores = products(q, k, query_rows, used, key_rows, inside, DIM, STEP_D)
            seen = seen_tile(position, last, row_depth, keys, end, key_depth, window)
            index = keys
            if segments is not None:
                index = tl.load(segments + i_b * length + keys, mask=inside, other=-1).to(tl.int32)
            grad_p = load_upstream(grad, at_row, index, used, inside & (index >= 0) & (index < end_segment), grad_n, PER_ROW)
            grad_scores = score_gradients(scores, row_lse, taken, grad_p, seen, scale, softcap)
            acc = gradient_product(grad_scores, k, acc)
    if MEAN:
        acc /= row_weight(row_positions, i_b, num_rows, kv_heads * group)
    columns = tl.arange(0, BLOCK_D)
    at = offset(flat, DIM)[:, None] + columns[None, :]
    tl.store(
        grad_query + at,
        narrow(acc, grad_query.dtype.element_ty),
        mask=(packed < num_rows * group)[:, None] & (columns < DIM)[None, :],
    )


@triton.jit
def grad_key_kernel(
    query,  # (B, Hq, R, D)
    key,  # (B, Hkv, S, D)
    segments,  # (B, S); None: each key is its own
    row_positions,  # (B, R)
    tree_end,  # (B, S); None: causal
    reach,  # (B, S); None: to the row itself
    depth,  # (B, S); None: window counts packed indices
    lse,  # (B, Hq, R)
    correction,  # (B, Hq, R) rowsum(P dP)
    grad,  # strided over (B, Hq, R, N or S)
    grad_key,  # (B, Hkv, S, D)
    scale,
    softcap,
    window,
    num_rows,
    group,
    kv_heads,
    length,
    end_segment,
    query_b,
    query_h,
    query_r,
    key_b,
    key_h,
    key_s,
    grad_b,
    grad_h,
    grad_r,
    grad_n,
    PER_ROW: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP_D: tl.constexpr,
    MEAN: tl.constexpr,
):
    """The gradient of one block of keys: the packed rows bring the sum over the heads of a group along."""
    i_n, i_b, i_h = tl.program_id(0), tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    keys = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = keys < length
    end, key_depth = key_facts(tree_end, depth, i_b, keys, length)
    key_rows = key + offset(i_b, key_b) + offset(i_h, key_h) + offset(keys, key_s)
    grad += offset(i_b, grad_b)
    k = None
    if STEP_D == BLOCK_D:
        k = head_vectors(key_rows, inside, 0, DIM, BLOCK_D)  # [BN, BD]
    index = keys
    if segments is not None:
        index = tl.load(segments + i_b * length + keys, mask=inside, other=-1).to(tl.int32)
    member = inside & (index >= 0) & (index < end_segment)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for scan in range(0, num_rows * group, SCAN * BLOCK_M):
        order, count = row_tiles(
            row_positions, reach, depth, i_b, scan, keys, end, key_depth, num_rows, group, length, window, BLOCK_M
        )
        for i in range(count):
            packed = scan + at_rank(order, i) * BLOCK_M + tl.arange(0, BLOCK_M)
            head = i_h * group + packed % group
            flat = (i_b * kv_heads * group + head) * num_rows + packed // group
            position, last, row_depth = row_facts(row_positions, reach, depth, i_b, packed, num_rows, group, length)
            used = position >= 0
            query_rows = query + offset(i_b, query_b) + offset(head, query_h) + offset(packed // group, query_r)
            q = head_vectors(query_rows, used, 0, DIM, BLOCK_D)  # [BM, BD]
            scores = products(q, k, query_rows, used, key_rows, inside, DIM, STEP_D)
            seen = seen_tile(position, last, row_depth, keys, end, key_depth, window)
            at_row = offset(head, grad_h) + offset(packed // group, grad_r)
            grad_p = load_upstream(grad, at_row, index, used, member, grad_n, PER_ROW)
            row_lse = tl.load(lse + flat, mask=used, other=0.0)
            taken = tl.load(correction + flat, mask=used, other=0.0)
            grad_scores = score_gradients(scores, row_lse, taken, grad_p, seen, scale, softcap)
            acc = gradient_product(tl.trans(grad_scores), q, acc)
    if MEAN:
        acc /= row_weight(row_positions, i_b, num_rows, kv_heads * group)
    columns = tl.arange(0, BLOCK_D)
    at = (offset(tl.program_id(1), length) + keys)[:, None] * DIM + columns[None, :]
    tl.store(grad_key + at, narrow(acc, grad_key.dtype.element_ty), mask=inside[:, None] & (columns < DIM)[None, :])
