"""Kernel of `logit_rows`: one program reads a row of logits, and a second time, backwards, where it turns them into coefficients.

Every lane folds its own columns (running maximum and sum) and lanes meet once at the end of the row: a block of BLOCK columns costs no
reduction. Names: z is hidden @ weight.T + bias, scores are the logits of the softmax, `lane_` is a lane's own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic_device import capped, narrow, tanh_slope_at

FLOOR = tl.constexpr(-3.4028234663852886e38)
"""Where running maxima start: finite, so that differences from it are never inf - inf."""


@triton.jit
def scaled(z, inner, outer):
    """-> logits of the softmax, float32: outer z, or outer tanh(inner z) with a softcap."""
    return capped(z.to(tl.float32), inner, inner is not None) * outer


@triton.jit
def log1p(x):
    """log(1 + x) of x >= 0; what 1 + x rounds off is made good by the quotient."""
    rounded = 1.0 + x
    return tl.where(rounded == 1.0, x, tl.log(rounded) * (x / (rounded - 1.0)))


@triton.jit
def fold_block(scores, column, target, lane_max, lane_sum, lane_moment, WITH_MOMENT: tl.constexpr):
    """One more block in the running state of the columns other than the target: maximum, sum of exp(s - maximum), sum of
    exp(s - maximum) (s - maximum). One exponential a column: either the new term fades or the sum so far.
    """
    scores = tl.where(column == target, float("-inf"), scores)
    rise = scores - lane_max
    e = tl.exp(-tl.abs(rise))
    higher = rise > 0.0
    if WITH_MOMENT:
        # A term of s = -inf is 0, not 0 * -inf; rise times its exponential is small, times the sum it might overflow.
        product = e * tl.maximum(rise, FLOOR)
        lane_moment = tl.where(higher, lane_moment * e - lane_sum * product, lane_moment + product)
    lane_sum = tl.where(higher, lane_sum * e + 1.0, lane_sum + e)
    lane_max = tl.where(higher, scores, lane_max)
    return lane_max, lane_sum, lane_moment


@triton.jit
def coefficients(z, column, target, own_coefficient, rate, row_max, inner, outer):
    """-> in the dtype of z: own_coefficient for the target, rate exp(s - row_max) for the others, both times the softcap's slope."""
    coefficient = tl.where(column == target, own_coefficient, rate * tl.exp(scaled(z, inner, outer) - row_max))
    if inner is not None:
        coefficient *= tanh_slope_at(z.to(tl.float32) * inner)
    return narrow(coefficient, z.dtype)


@triton.jit
def fold_rows_kernel(
    logits,  # (R, V)
    targets,  # (R,)
    logps,  # (R,)
    entropy,  # (R,); None: not wanted
    max_logp,  # (R,) or None
    is_top1,  # (R,) or None
    mean_logit,  # (R,) or None
    inner,  # None: no softcap
    outer,
    factor,  # None: no coefficients
    ignore_index,
    width,
    stride,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    KEEP: tl.constexpr,
):
    """A row's log-probability of its target and statistics; with `factor` its logits become factor ([v = target] - p_v) slope_v.

    Whole blocks are read without a mask, which in a vocabulary that is no multiple of 16 would cut every read into single elements.
    """
    row = tl.program_id(0)
    row_logits = logits + row.to(tl.int64) * stride
    first_time: tl.constexpr = "evict_last" if KEEP and factor is not None else ""
    second_time: tl.constexpr = "evict_first" if KEEP else ""
    lane = tl.arange(0, BLOCK)
    whole = width // BLOCK * BLOCK
    last = whole + lane
    target = tl.load(targets + row)

    if target == ignore_index:
        tl.store(logps + row, 0.0)
        if entropy is not None:
            tl.store(entropy + row, 0.0)
        if max_logp is not None:
            tl.store(max_logp + row, 0.0)
        if is_top1 is not None:
            tl.store(is_top1 + row, 0.0)
        if mean_logit is not None:
            tl.store(mean_logit + row, 0.0)
        if factor is not None:
            zero = tl.zeros([BLOCK], logits.dtype.element_ty)
            for start in range(0, whole, BLOCK):
                tl.store(row_logits + start + lane, zero)
            tl.store(row_logits + last, zero, mask=last < width)
        return

    # A target outside the vocabulary gives NaN, where PyTorch's gather stops the device.
    known = (target >= 0) & (target < width)
    own = scaled(tl.load(row_logits + target, mask=known, other=float("nan")), inner, outer)
    lane_max = tl.full([BLOCK], FLOOR, tl.float32)
    lane_sum = tl.zeros([BLOCK], tl.float32)
    lane_moment = tl.zeros([BLOCK], tl.float32)
    lane_total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        column = start + lane
        scores = scaled(tl.load(row_logits + column, eviction_policy=first_time), inner, outer)
        lane_max, lane_sum, lane_moment = fold_block(scores, column, target, lane_max, lane_sum, lane_moment, entropy is not None)
        if mean_logit is not None:
            lane_total += scores
    inside = last < width
    scores = scaled(tl.load(row_logits + last, mask=inside, other=0.0), inner, outer)
    if mean_logit is not None:
        lane_total += tl.where(inside, scores, 0.0)
    scores = tl.where(inside, scores, float("-inf"))
    lane_max, lane_sum, lane_moment = fold_block(scores, last, target, lane_max, lane_sum, lane_moment, entropy is not None)

    others_max = tl.max(lane_max)
    lane_decay = tl.exp(lane_max - others_max)
    row_max = tl.maximum(others_max, own)
    decay = tl.exp(others_max - row_max)
    others = tl.sum(lane_sum * lane_decay) * decay
    # Not the difference of the two where they are one number: as part of a fused multiply-add it would be what rounding left off.
    likeliest = own >= others_max
    gap = tl.where(likeliest, 0.0, own - row_max)
    mine = tl.exp(gap)
    row_sum = others + mine
    # Of a target that is all but certain the log-probability is the others' share.
    log_sum = tl.where(likeliest, log1p(others), tl.log(row_sum))
    tl.store(logps + row, gap - log_sum)
    if entropy is not None:
        moment = tl.sum(lane_moment * lane_decay + lane_sum * ((lane_max - others_max) * lane_decay)) * decay
        moment += others * (others_max - row_max) + mine * tl.maximum(gap, FLOOR)
        tl.store(entropy + row, log_sum - moment / row_sum)
    if max_logp is not None:
        tl.store(max_logp + row, -log_sum)
    if is_top1 is not None:
        tl.store(is_top1 + row, likeliest.to(tl.float32))
    if mean_logit is not None:
        tl.store(mean_logit + row, tl.sum(lane_total) / width)

    if factor is not None:
        # 1 - p of the target is the others' share, exact also where p is all but 1.
        own_coefficient = factor * (others / row_sum)
        rate = -factor / row_sum
        # From the row's end, which was read last and is still in the caches, to its beginning.
        z = tl.load(row_logits + last, mask=inside, other=0.0)
        coefficient = coefficients(z, last, target, own_coefficient, rate, row_max, inner, outer)
        tl.store(row_logits + last, coefficient, mask=inside)
        for back in tl.range(0, whole, BLOCK, num_stages=STAGES):
            column = whole - BLOCK - back + lane
            z = tl.load(row_logits + column, eviction_policy=second_time)
            coefficient = coefficients(z, column, target, own_coefficient, rate, row_max, inner, outer)
            tl.store(row_logits + column, coefficient)
