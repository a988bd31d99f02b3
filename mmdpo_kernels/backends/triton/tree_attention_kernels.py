"""Kernels of `tree_attention`: what a tree hides is never visited, and the mass of segments falls out of the softmax of the same pass.

BM queries by BN keys are one step of every loop. Exponentials are exp2, which the hardware has. A score is `outer * f(inner * query.key)`,
f = tanh under a softcap, else the identity; without `inner` the product waits for the exponential, which multiplies anyway.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .arithmetic_device import capped, dot, dot_exact, narrow, tanh_slope
from .attention_device import COLUMNS, offset
from .tree_attention_device import (
    LOG2_E,
    last_keys,
    load_lse,
    load_mass,
    load_one_hot,
    load_tile,
    load_vector,
    probabilities,
    seen_pairs,
    store_tile,
    stream_tile,
    tile_source,
)
from .tree_plan import MIXED

_MIXED = tl.constexpr(MIXED)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_LN_2 = tl.constexpr(math.log(2.0))


@triton.jit(do_not_specialize=["heads", "length", "window", "num_segments", "first_segment"])
def forward_kernel(
    query,  # (B, Hq, S, D)
    key,  # (B, Hkv, S, D)
    value,  # (B, Hkv, S, Dv)
    output,  # (B, S, Hq, Dv)
    lse,  # (B, Hq, S)
    mass,  # (B, Hq, S, N); None: no mass
    tree_end,  # (B, S); None: causal
    reach,  # (B, S); None: to the query itself
    depth,  # (B, S); None: window counts packed indices
    plan,  # (B, cdiv(S, BM), 2 + cdiv(S, BN)); None: causal, without mass
    segments,  # (B, S)
    kinds,  # (B, cdiv(S, BN))
    query_b,
    query_h,
    query_s,
    key_b,
    key_h,
    key_s,
    value_b,
    value_h,
    value_s,
    plan_b,
    heads,
    length,
    window,
    inner,
    outer,
    num_segments,
    first_segment,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """OVERLAP: a block's product with its values waits for the next block's scores, whose exponentials then run beside it."""
    num_m, num_n = tl.cdiv(length, BLOCK_M), tl.cdiv(length, BLOCK_N)
    # The last queries see most keys: they start first.
    i_m = num_m - 1 - tl.program_id(0) % num_m
    i_bh = tl.program_id(0) // num_m
    i_b, i_h = i_bh // heads, i_bh % heads
    start_m = i_m * BLOCK_M
    rows = start_m + tl.arange(0, BLOCK_M)
    query += offset(i_b, query_b) + offset(i_h, query_h)
    key += offset(i_b, key_b) + offset(i_h // GROUP, key_h)
    value += offset(i_b, value_b) + offset(i_h // GROUP, value_h)
    if tree_end is not None:
        tree_end += offset(i_b, length)
    if reach is not None:
        reach += offset(i_b, length)
    if depth is not None:
        depth += offset(i_b, length)
    if plan is not None:
        plan += offset(i_b, plan_b) + offset(i_m, 2 + num_n)
        num_full, num_seen = tl.load(plan), tl.load(plan + 1)
    else:
        num_full = (start_m + 1) // BLOCK_N
        num_seen = tl.cdiv(min(start_m + BLOCK_M, length), BLOCK_N)

    queries_of = tile_source(query, None, None, query_s, length, BLOCK_M, DIM, BLOCK_D, DESCRIPTORS)
    q = stream_tile(queries_of, None, None, start_m, query_s, length, BLOCK_M, DIM, BLOCK_D, True, DESCRIPTORS)  # [BM, D]
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    outer *= LOG2_E
    # A finite maximum where nothing was seen yet: no difference below is ever -inf - -inf.
    row_max = tl.full([BLOCK_M], _LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    keys_of = tile_source(key, None, None, key_s, length, BLOCK_N, DIM, BLOCK_D, DESCRIPTORS)
    values_of = tile_source(value, None, None, value_s, length, BLOCK_N, VALUE_DIM, BLOCK_V, DESCRIPTORS)
    if OVERLAP:
        p = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        decay = row_sum
        start_v = length  # zeros
    if mass is not None:
        segments += offset(i_b, length)
        kinds += i_b * num_n
        columns = first_segment + tl.arange(0, COLUMNS)
        acc_mass = tl.zeros([BLOCK_M, COLUMNS], tl.float32)  # relative to row_max

    # Key blocks that every query sees whole, then those that need a mask. The compiler parts the warps of one loop alone: of all blocks.
    for MASKED in tl.static_range(SPECIALIZE, 2):
        if MASKED:
            lasts = last_keys(rows, reach, length)
        begin = num_full if MASKED and not SPECIALIZE else 0
        for it in tl.range(begin, num_seen if MASKED else num_full, warp_specialize=SPECIALIZE):
            i_n = it if plan is None else tl.load(plan + 2 + it)
            start_n = i_n * BLOCK_N
            k = stream_tile(keys_of, None, None, start_n, key_s, length, BLOCK_N, DIM, BLOCK_D, MASKED, DESCRIPTORS)  # [BN, D]
            scores = capped(dot(q, tl.trans(k)), inner, SOFTCAP)  # [BM, BN]
            if OVERLAP:
                v = stream_tile(values_of, None, None, start_v, value_s, length, BLOCK_N, VALUE_DIM, BLOCK_V, True, DESCRIPTORS)
                acc = dot(narrow(p, v.dtype), v, acc * decay[:, None])
                start_v = start_n
            if MASKED:
                keys = start_n + tl.arange(0, BLOCK_N)
                scores = tl.where(
                    seen_pairs(rows[:, None], lasts[:, None], keys[None, :], tree_end, depth, length, window),
                    scores,
                    float("-inf"),
                )
            new_max = tl.maximum(row_max, tl.max(scores, 1) * outer)
            p = tl.exp2(scores * outer - new_max[:, None])
            decay = tl.exp2(row_max - new_max)
            block_sum = tl.sum(p, 1)
            if mass is not None:
                # Without a branch, beside which the assembler would wait for every product; blocks of several segments are all MASKED.
                kind = tl.load(kinds + i_n)
                acc_mass = acc_mass * decay[:, None] + tl.where((columns == kind)[None, :], block_sum[:, None], 0.0)
                if MASKED:  # noqa: SIM102 - one is known to the compiler
                    if kind == _MIXED:
                        acc_mass = dot_exact(p, load_one_hot(segments, keys, first_segment, length), acc_mass)
            if not OVERLAP:
                v = stream_tile(
                    values_of, None, None, start_n, value_s, length, BLOCK_N, VALUE_DIM, BLOCK_V, MASKED, DESCRIPTORS
                )  # [BN, Dv]
                acc = dot(narrow(p, v.dtype), v, acc * decay[:, None])
            row_sum = row_sum * decay + block_sum
            row_max = new_max

    if OVERLAP:
        v = stream_tile(values_of, None, None, start_v, value_s, length, BLOCK_N, VALUE_DIM, BLOCK_V, True, DESCRIPTORS)
        acc = dot(narrow(p, v.dtype), v, acc * decay[:, None])
    seen_any = row_sum != 0.0
    row_sum = tl.where(seen_any, row_sum, 1.0)
    share = 1.0 / row_sum
    inside = rows < length
    output += (offset(i_b, length) * heads + i_h) * VALUE_DIM
    store_tile(output, acc * share[:, None], start_m, heads * VALUE_DIM, length, BLOCK_M, VALUE_DIM, BLOCK_V)
    row_lse = tl.where(seen_any, row_max * _LN_2 + tl.log(row_sum), float("-inf"))
    tl.store(lse + offset(i_bh, length) + rows, row_lse, mask=inside)
    if mass is not None:
        mass += offset(i_bh, length) * num_segments
        tl.store(
            mass + offset(rows, num_segments)[:, None] + columns[None, :],
            acc_mass * share[:, None],
            mask=inside[:, None] & (columns < num_segments)[None, :],
        )


@triton.jit(do_not_specialize=["heads", "length", "num_segments"])
def row_correction_kernel(
    grad_output,  # (B, Hq, S, Dv) or None
    output,  # (B, Hq, S, Dv)
    grad_lse,  # (B, Hq, S) or None
    grad_mass,  # (B, Hq, S, N) or None
    mass,  # (B, Hq, S, N)
    correction,  # (B, Hq, S)
    grad_output_b,
    grad_output_h,
    grad_output_s,
    output_b,
    output_h,
    output_s,
    heads,
    length,
    num_segments,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """correction = dO.O + dmass.mass - dlse, the row sum that the softmax's gradient takes off dP."""
    num_m = tl.cdiv(length, BLOCK_M)
    start_m = tl.program_id(0) % num_m * BLOCK_M
    i_bh = tl.program_id(0) // num_m
    i_b, i_h = i_bh // heads, i_bh % heads
    rows = start_m + tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_M], tl.float32)
    if grad_output is not None:
        grad_output += offset(i_b, grad_output_b) + offset(i_h, grad_output_h)
        output += offset(i_b, output_b) + offset(i_h, output_h)
        do = load_tile(grad_output, start_m, grad_output_s, length, BLOCK_M, VALUE_DIM, BLOCK_V, True)
        o = load_tile(output, start_m, output_s, length, BLOCK_M, VALUE_DIM, BLOCK_V, True)
        total += tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if grad_mass is not None:
        grad_mass += offset(i_bh, length) * num_segments
        mass += offset(i_bh, length) * num_segments
        for first in range(0, num_segments, COLUMNS):
            upstream = load_mass(grad_mass, rows, first, length, num_segments)
            total += tl.sum(upstream * load_mass(mass, rows, first, length, num_segments), 1)
    if grad_lse is not None:
        total -= tl.load(grad_lse + offset(i_bh, length) + rows, mask=rows < length, other=0.0)
    tl.store(correction + offset(i_bh, length) + rows, total, mask=rows < length)


@triton.jit(do_not_specialize=["heads", "length", "window", "num_segments"])
def grad_key_kernel(
    query,  # (B, Hq, S, D)
    key,  # (B, Hkv, S, D)
    value,  # (B, Hkv, S, Dv)
    grad_output,  # (B, Hq, S, Dv) or None
    grad_mass,  # (B, Hq, S, N) or None
    lse,  # (B, Hq, S)
    correction,  # (B, Hq, S)
    grad_key,  # (B, S, Hkv, D)
    grad_value,  # (B, S, Hkv, Dv)
    tree_end,  # (B, S); None: causal
    reach,  # (B, S); None: to the query itself
    depth,  # (B, S); None: window counts packed indices
    plan,  # (B, cdiv(S, BN), 2 + cdiv(S, BM)); None: causal
    segments,  # (B, S)
    query_b,
    query_h,
    query_s,
    key_b,
    key_h,
    key_s,
    value_b,
    value_h,
    value_s,
    grad_output_b,
    grad_output_h,
    grad_output_s,
    plan_b,
    heads,
    length,
    window,
    inner,
    outer,
    scale,
    num_segments,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
    PASSES: tl.constexpr,
):
    """Sums over all queries and all heads of the group, in one program and one order.

    OVERLAP: a block's products with its probabilities wait for the next block's scores, whose exponentials then run beside them.
    """
    num_m, num_n = tl.cdiv(length, BLOCK_M), tl.cdiv(length, BLOCK_N)
    i_n = tl.program_id(0) % num_n  # the first keys are seen by most queries
    i_bh = tl.program_id(0) // num_n
    kv_heads = heads // GROUP
    i_b, i_h = i_bh // kv_heads, i_bh % kv_heads
    start_n = i_n * BLOCK_N
    keys = start_n + tl.arange(0, BLOCK_N)
    first_head = i_b * heads + i_h * GROUP
    query += offset(i_b, query_b) + offset(i_h * GROUP, query_h)
    key += offset(i_b, key_b) + offset(i_h, key_h)
    value += offset(i_b, value_b) + offset(i_h, value_h)
    lse += offset(first_head, length)
    correction += offset(first_head, length)
    if grad_output is not None:
        grad_output += offset(i_b, grad_output_b) + offset(i_h * GROUP, grad_output_h)
    if tree_end is not None:
        tree_end += offset(i_b, length)
    if reach is not None:
        reach += offset(i_b, length)
    if depth is not None:
        depth += offset(i_b, length)
    if grad_mass is not None:
        grad_mass += offset(first_head, length) * num_segments
        segments += offset(i_b, length)
    if plan is not None:
        plan += offset(i_b, plan_b) + offset(i_n, 2 + num_m)
        num_full, num_seen = tl.load(plan), tl.load(plan + 1)
        first_full = 0
    else:
        # Query blocks [diagonal, first_full) hold the diagonal, [first_full, whole) see all keys, and one may reach beyond S.
        whole = length // BLOCK_M
        diagonal = start_n // BLOCK_M
        first_full = min(tl.cdiv(start_n + BLOCK_N - 1, BLOCK_M), whole)
        num_full = whole - first_full
        num_seen = num_m - diagonal

    keys_of = tile_source(key, None, None, key_s, length, BLOCK_N, DIM, BLOCK_D, DESCRIPTORS)
    k = stream_tile(keys_of, None, None, start_n, key_s, length, BLOCK_N, DIM, BLOCK_D, True, DESCRIPTORS)  # [BN, D]
    values_of = tile_source(value, None, None, value_s, length, BLOCK_N, VALUE_DIM, BLOCK_V, DESCRIPTORS)
    v = stream_tile(values_of, None, None, start_n, value_s, length, BLOCK_N, VALUE_DIM, BLOCK_V, True, DESCRIPTORS)  # [BN, Dv]
    queries_of = tile_source(query, GROUP, query_h, query_s, length, BLOCK_M, DIM, BLOCK_D, DESCRIPTORS)
    if grad_output is not None:
        upstream_of = tile_source(
            grad_output, GROUP, grad_output_h, grad_output_s, length, BLOCK_M, VALUE_DIM, BLOCK_V, DESCRIPTORS
        )
    acc_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_value = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    if OVERLAP:
        p = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        grad_scores = p
        g_before = tl.full((), 0, tl.int32)
        start_before = length  # zeros
    for MASKED in tl.static_range(SPECIALIZE, 2):
        # All heads in one loop, so that loads run ahead from one to the next.
        begin = num_full if MASKED and not SPECIALIZE else 0
        count = num_seen - begin if MASKED else num_full
        for it in tl.range(0, GROUP * count, warp_specialize=SPECIALIZE):
            i_g = it // count
            i_m = it % count
            if plan is not None:
                i_m = tl.load(plan + 2 + begin + i_m)
            elif SPECIALIZE:
                i_m += diagonal
            elif MASKED:
                i_m = tl.where(diagonal + i_m < first_full, diagonal + i_m, num_m - 1)
            else:
                i_m += first_full
            start_m = i_m * BLOCK_M
            rows = start_m + tl.arange(0, BLOCK_M)
            q = stream_tile(
                queries_of, i_g, query_h, start_m, query_s, length, BLOCK_M, DIM, BLOCK_D, MASKED, DESCRIPTORS
            )  # [BM, D]
            row_lse = load_lse(lse + offset(i_g, length), rows, length, MASKED)
            scores = capped(dot(k, tl.trans(q)), inner, SOFTCAP)  # [BN, BM]
            if OVERLAP:
                if grad_output is not None:
                    do = stream_tile(
                        upstream_of,
                        g_before,
                        grad_output_h,
                        start_before,
                        grad_output_s,
                        length,
                        BLOCK_M,
                        VALUE_DIM,
                        BLOCK_V,
                        True,
                        DESCRIPTORS,
                    )
                    acc_value = dot(narrow(p, do.dtype), do, acc_value)
                q_before = stream_tile(
                    queries_of, g_before, query_h, start_before, query_s, length, BLOCK_M, DIM, BLOCK_D, True, DESCRIPTORS
                )
                acc_key = dot(narrow(grad_scores, q.dtype), q_before, acc_key)
                g_before = i_g
                start_before = start_m
            p = probabilities(scores, outer, row_lse[None, :], q.dtype == tl.float32)
            if MASKED:
                p = tl.where(
                    seen_pairs(
                        rows[None, :], last_keys(rows, reach, length)[None, :], keys[:, None], tree_end, depth, length, window
                    ),
                    p,
                    0.0,
                )
            grad_p = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            if grad_output is not None:
                do = stream_tile(
                    upstream_of,
                    i_g,
                    grad_output_h,
                    start_m,
                    grad_output_s,
                    length,
                    BLOCK_M,
                    VALUE_DIM,
                    BLOCK_V,
                    MASKED,
                    DESCRIPTORS,
                )  # [BM, Dv]
                if not OVERLAP:
                    acc_value = dot(narrow(p, do.dtype), do, acc_value)
                grad_p = dot(v, tl.trans(do))
            if grad_mass is not None:
                for first in tl.static_range(0, PASSES * COLUMNS, COLUMNS):
                    upstream = load_mass(grad_mass + offset(i_g, length) * num_segments, rows, first, length, num_segments)
                    grad_p = dot_exact(load_one_hot(segments, keys, first, length), tl.trans(upstream), grad_p)
            grad_p -= load_vector(correction + offset(i_g, length), rows, length, MASKED)[None, :]
            grad_scores = p * grad_p
            if SOFTCAP:
                grad_scores *= tanh_slope(scores)
            if not OVERLAP:
                acc_key = dot(narrow(grad_scores, q.dtype), q, acc_key)

    if OVERLAP:
        if grad_output is not None:
            do = stream_tile(
                upstream_of,
                g_before,
                grad_output_h,
                start_before,
                grad_output_s,
                length,
                BLOCK_M,
                VALUE_DIM,
                BLOCK_V,
                True,
                DESCRIPTORS,
            )
            acc_value = dot(narrow(p, do.dtype), do, acc_value)
        q = stream_tile(queries_of, g_before, query_h, start_before, query_s, length, BLOCK_M, DIM, BLOCK_D, True, DESCRIPTORS)
        acc_key = dot(narrow(grad_scores, q.dtype), q, acc_key)
    grad_key += (offset(i_b, length) * kv_heads + i_h) * DIM
    grad_value += (offset(i_b, length) * kv_heads + i_h) * VALUE_DIM
    store_tile(grad_key, acc_key * scale, start_n, kv_heads * DIM, length, BLOCK_N, DIM, BLOCK_D)
    store_tile(grad_value, acc_value, start_n, kv_heads * VALUE_DIM, length, BLOCK_N, VALUE_DIM, BLOCK_V)


@triton.jit(do_not_specialize=["heads", "length", "window", "num_segments"])
def grad_query_kernel(
    query,  # (B, Hq, S, D)
    key,  # (B, Hkv, S, D)
    value,  # (B, Hkv, S, Dv)
    grad_output,  # (B, Hq, S, Dv) or None
    grad_mass,  # (B, Hq, S, N) or None
    lse,  # (B, Hq, S)
    correction,  # (B, Hq, S)
    grad_query,  # (B, S, Hq, D)
    tree_end,  # (B, S); None: causal
    reach,  # (B, S); None: to the query itself
    depth,  # (B, S); None: window counts packed indices
    plan,  # (B, cdiv(S, BM), 2 + cdiv(S, BN)); None: causal
    segments,  # (B, S)
    query_b,
    query_h,
    query_s,
    key_b,
    key_h,
    key_s,
    value_b,
    value_h,
    value_s,
    grad_output_b,
    grad_output_h,
    grad_output_s,
    plan_b,
    heads,
    length,
    window,
    inner,
    outer,
    scale,
    num_segments,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
    PASSES: tl.constexpr,
):
    num_m, num_n = tl.cdiv(length, BLOCK_M), tl.cdiv(length, BLOCK_N)
    i_m = num_m - 1 - tl.program_id(0) % num_m
    i_bh = tl.program_id(0) // num_m
    i_b, i_h = i_bh // heads, i_bh % heads
    start_m = i_m * BLOCK_M
    rows = start_m + tl.arange(0, BLOCK_M)
    query += offset(i_b, query_b) + offset(i_h, query_h)
    key += offset(i_b, key_b) + offset(i_h // GROUP, key_h)
    value += offset(i_b, value_b) + offset(i_h // GROUP, value_h)
    lse += offset(i_bh, length)
    correction += offset(i_bh, length)
    if tree_end is not None:
        tree_end += offset(i_b, length)
    if reach is not None:
        reach += offset(i_b, length)
    if depth is not None:
        depth += offset(i_b, length)
    if grad_mass is not None:
        grad_mass += offset(i_bh, length) * num_segments
        segments += offset(i_b, length)
    if plan is not None:
        plan += offset(i_b, plan_b) + offset(i_m, 2 + num_n)
        num_full, num_seen = tl.load(plan), tl.load(plan + 1)
    else:
        num_full = (start_m + 1) // BLOCK_N
        num_seen = tl.cdiv(min(start_m + BLOCK_M, length), BLOCK_N)

    queries_of = tile_source(query, None, None, query_s, length, BLOCK_M, DIM, BLOCK_D, DESCRIPTORS)
    q = stream_tile(queries_of, None, None, start_m, query_s, length, BLOCK_M, DIM, BLOCK_D, True, DESCRIPTORS)  # [BM, D]
    keys_of = tile_source(key, None, None, key_s, length, BLOCK_N, DIM, BLOCK_D, DESCRIPTORS)
    if grad_output is not None:
        grad_output += offset(i_b, grad_output_b) + offset(i_h, grad_output_h)
        upstream_of = tile_source(grad_output, None, None, grad_output_s, length, BLOCK_M, VALUE_DIM, BLOCK_V, DESCRIPTORS)
        do = stream_tile(
            upstream_of, None, None, start_m, grad_output_s, length, BLOCK_M, VALUE_DIM, BLOCK_V, True, DESCRIPTORS
        )  # [BM, Dv]
        values_of = tile_source(value, None, None, value_s, length, BLOCK_N, VALUE_DIM, BLOCK_V, DESCRIPTORS)
    row_lse = load_lse(lse, rows, length, True)
    taken = load_vector(correction, rows, length, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if OVERLAP:
        grad_scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        start_before = length  # zeros
    for MASKED in tl.static_range(SPECIALIZE, 2):
        if MASKED:
            lasts = last_keys(rows, reach, length)
        begin = num_full if MASKED and not SPECIALIZE else 0
        for it in tl.range(begin, num_seen if MASKED else num_full, warp_specialize=SPECIALIZE):
            i_n = it if plan is None else tl.load(plan + 2 + it)
            start_n = i_n * BLOCK_N
            keys = start_n + tl.arange(0, BLOCK_N)
            k = stream_tile(keys_of, None, None, start_n, key_s, length, BLOCK_N, DIM, BLOCK_D, MASKED, DESCRIPTORS)  # [BN, D]
            scores = capped(dot(q, tl.trans(k)), inner, SOFTCAP)  # [BM, BN]
            if OVERLAP:
                before = stream_tile(keys_of, None, None, start_before, key_s, length, BLOCK_N, DIM, BLOCK_D, True, DESCRIPTORS)
                acc = dot(narrow(grad_scores, k.dtype), before, acc)
                start_before = start_n
            p = probabilities(scores, outer, row_lse[:, None], q.dtype == tl.float32)
            if MASKED:
                p = tl.where(seen_pairs(rows[:, None], lasts[:, None], keys[None, :], tree_end, depth, length, window), p, 0.0)
            grad_p = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if grad_output is not None:
                v = stream_tile(
                    values_of, None, None, start_n, value_s, length, BLOCK_N, VALUE_DIM, BLOCK_V, MASKED, DESCRIPTORS
                )  # [BN, Dv]
                grad_p = dot(do, tl.trans(v))
            if grad_mass is not None:
                for first in tl.static_range(0, PASSES * COLUMNS, COLUMNS):
                    upstream = load_mass(grad_mass, rows, first, length, num_segments)
                    grad_p = dot_exact(upstream, tl.trans(load_one_hot(segments, keys, first, length)), grad_p)
            grad_p -= taken[:, None]
            grad_scores = p * grad_p
            if SOFTCAP:
                grad_scores *= tanh_slope(scores)
            if not OVERLAP:
                acc = dot(narrow(grad_scores, k.dtype), k, acc)

    if OVERLAP:
        k = stream_tile(keys_of, None, None, start_before, key_s, length, BLOCK_N, DIM, BLOCK_D, True, DESCRIPTORS)
        acc = dot(narrow(grad_scores, k.dtype), k, acc)
    grad_query += (offset(i_b, length) * heads + i_h) * DIM
    store_tile(grad_query, acc * scale, start_m, heads * DIM, length, BLOCK_M, DIM, BLOCK_D)
