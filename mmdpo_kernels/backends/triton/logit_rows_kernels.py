"""Kernel of `logit_rows`: one program reads a row of logits, and a second time, backwards, where it turns them into coefficients.

Every lane folds its own columns (running maximum and sum) and lanes meet once at the end of the row: a block costs no reduction.
Names: `b_` is a block's values, one a lane; capitals are addresses and compile-time constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import narrow, tanh

FLOOR = tl.constexpr(-3.4028234663852886e38)
"""Where running maxima start: finite, so that differences from it are never inf - inf."""


@triton.jit
def scaled(b_z, inner, outer):
    """-> logits of the softmax, float32: outer z, or outer tanh(inner z) with a softcap."""
    b_z = b_z.to(tl.float32)
    if inner is not None:
        b_z = tanh(b_z * inner)
    return b_z * outer


@triton.jit
def slope(b_z, inner):
    """1 - tanh(inner z)^2, from the exponential: the tanh of a capped logit is too near 1 to tell."""
    b_e = tl.exp2(tl.abs(b_z.to(tl.float32) * inner) * -2.885390081777927)  # 2 log2(e)
    return 4.0 * b_e / ((1.0 + b_e) * (1.0 + b_e))


@triton.jit
def log1p(x):
    """log(1 + x) of x >= 0; what 1 + x rounds off is made good by the quotient."""
    rounded = 1.0 + x
    return tl.where(rounded == 1.0, x, tl.log(rounded) * (x / (rounded - 1.0)))


@triton.jit
def fold_block(b_s, column, target, b_peak, b_total, b_moment, WITH_MOMENT: tl.constexpr):
    """One more block in the running state of the columns other than the target: maximum, sum of exp(s - maximum), sum of
    exp(s - maximum) (s - maximum). One exponential a column: either the new term fades or the sum so far.
    """
    b_s = tl.where(column == target, float("-inf"), b_s)
    b_rise = b_s - b_peak
    b_e = tl.exp(-tl.abs(b_rise))
    higher = b_rise > 0.0
    if WITH_MOMENT:
        # A term of s = -inf is 0, not 0 * -inf; b_rise times its exponential is small, times the total it might overflow.
        b_product = b_e * tl.maximum(b_rise, FLOOR)
        b_moment = tl.where(higher, b_moment * b_e - b_total * b_product, b_moment + b_product)
    b_total = tl.where(higher, b_total * b_e + 1.0, b_total + b_e)
    b_peak = tl.where(higher, b_s, b_peak)
    return b_peak, b_total, b_moment


@triton.jit
def coefficients(b_z, column, target, own_coefficient, rate, highest, inner, outer):
    """-> in the dtype of z: own_coefficient for the target, rate exp(s - highest) for the others, both times the softcap's slope."""
    b_c = tl.where(column == target, own_coefficient, rate * tl.exp(scaled(b_z, inner, outer) - highest))
    if inner is not None:
        b_c *= slope(b_z, inner)
    return narrow(b_c, b_z.dtype)


@triton.jit
def fold_rows(
    LOGITS,
    TARGETS,
    LOGPS,
    ENTROPY,
    MAX_LOGP,
    IS_TOP1,
    MEAN_LOGIT,
    inner,
    outer,
    factor,
    ignore_index,
    width,
    stride,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A row's log-probability of its target and statistics; with `factor` its logits become factor ([v = target] - p_v) slope_v.

    Whole blocks are read without a mask, which in a vocabulary that is no multiple of 16 would cut every read into single elements.
    """
    row = tl.program_id(0)
    p_row = LOGITS + row.to(tl.int64) * stride
    lane = tl.arange(0, BLOCK)
    whole = width // BLOCK * BLOCK
    last = whole + lane
    target = tl.load(TARGETS + row)

    if target == ignore_index:
        tl.store(LOGPS + row, 0.0)
        if ENTROPY is not None:
            tl.store(ENTROPY + row, 0.0)
        if MAX_LOGP is not None:
            tl.store(MAX_LOGP + row, 0.0)
        if IS_TOP1 is not None:
            tl.store(IS_TOP1 + row, 0.0)
        if MEAN_LOGIT is not None:
            tl.store(MEAN_LOGIT + row, 0.0)
        if factor is not None:
            b_zero = tl.zeros([BLOCK], LOGITS.dtype.element_ty)
            for start in range(0, whole, BLOCK):
                tl.store(p_row + start + lane, b_zero)
            tl.store(p_row + last, b_zero, mask=last < width)
        return

    # A target outside the vocabulary gives NaN, where PyTorch's gather stops the device.
    known = (target >= 0) & (target < width)
    own = scaled(tl.load(p_row + target, mask=known, other=float("nan")), inner, outer)
    b_peak = tl.full([BLOCK], FLOOR, tl.float32)
    b_total = tl.zeros([BLOCK], tl.float32)
    b_moment = tl.zeros([BLOCK], tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        column = start + lane
        b_s = scaled(tl.load(p_row + column), inner, outer)
        b_peak, b_total, b_moment = fold_block(b_s, column, target, b_peak, b_total, b_moment, ENTROPY is not None)
        if MEAN_LOGIT is not None:
            b_sum += b_s
    inside = last < width
    b_s = scaled(tl.load(p_row + last, mask=inside, other=0.0), inner, outer)
    if MEAN_LOGIT is not None:
        b_sum += tl.where(inside, b_s, 0.0)
    b_s = tl.where(inside, b_s, float("-inf"))
    b_peak, b_total, b_moment = fold_block(b_s, last, target, b_peak, b_total, b_moment, ENTROPY is not None)

    peak = tl.max(b_peak)
    b_fade = tl.exp(b_peak - peak)
    highest = tl.maximum(peak, own)
    fade = tl.exp(peak - highest)
    others = tl.sum(b_total * b_fade) * fade
    # Not the difference of the two where they are one number: as part of a fused multiply-add it would be what rounding left off.
    likeliest = own >= peak
    gap = tl.where(likeliest, 0.0, own - highest)
    mine = tl.exp(gap)
    total = others + mine
    # Of a target that is all but certain the log-probability is the others' share.
    log_total = tl.where(likeliest, log1p(others), tl.log(total))
    tl.store(LOGPS + row, gap - log_total)
    if ENTROPY is not None:
        moment = tl.sum(b_moment * b_fade + b_total * ((b_peak - peak) * b_fade)) * fade
        moment += others * (peak - highest) + mine * tl.maximum(gap, FLOOR)
        tl.store(ENTROPY + row, log_total - moment / total)
    if MAX_LOGP is not None:
        tl.store(MAX_LOGP + row, -log_total)
    if IS_TOP1 is not None:
        tl.store(IS_TOP1 + row, likeliest.to(tl.float32))
    if MEAN_LOGIT is not None:
        tl.store(MEAN_LOGIT + row, tl.sum(b_sum) / width)

    if factor is not None:
        # 1 - p of the target is the others' share, exact also where p is all but 1.
        own_coefficient = factor * (others / total)
        rate = -factor / total
        # From the row's end, which was read last and is still in the caches, to its beginning.
        b_z = tl.load(p_row + last, mask=inside, other=0.0)
        b_c = coefficients(b_z, last, target, own_coefficient, rate, highest, inner, outer)
        tl.store(p_row + last, b_c, mask=inside)
        for back in tl.range(0, whole, BLOCK, num_stages=STAGES):
            column = whole - BLOCK - back + lane
            b_z = tl.load(p_row + column)
            b_c = coefficients(b_z, column, target, own_coefficient, rate, highest, inner, outer)
            tl.store(p_row + column, b_c)
