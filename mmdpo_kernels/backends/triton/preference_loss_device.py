"""Functions that losses are made of, with their derivatives, to float32's last digits: the GPU's own exp and log are less near than PyTorch's.

Compiled or interpreted they are the same; a NaN stays one.
"""

from __future__ import annotations

import triton
import triton.language as tl

MINUS_LOG_SIGMOID = tl.constexpr(0)  # in the order of LINKS
HINGE = tl.constexpr(1)
SQUARE = tl.constexpr(2)
SIGMOID = tl.constexpr(3)
IDENTITY = tl.constexpr(4)


@triton.jit
def linked(x, LINK: tl.constexpr):
    """A link and its derivative."""
    if LINK == MINUS_LOG_SIGMOID:
        return minus_log_sigmoid(x)
    elif LINK == HINGE:
        distance = 1.0 - x
        return tl.where(distance < 0, 0.0, distance), tl.where(distance > 0, -1.0, 0.0)
    elif LINK == SQUARE:
        return x * x, 2.0 * x
    elif LINK == SIGMOID:
        return sigmoid(x)
    else:
        tl.static_assert(LINK == IDENTITY)
        return x, tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def minus_log_sigmoid(x):
    """`-log sigmoid(x)` and its derivative."""
    small = exp_below_zero(-tl.abs(x))
    slope = tl.where(x < 0, -1.0, -small) / (1.0 + small)
    return tl.where(x < 0, -x, 0.0) + log1p(small), slope


@triton.jit
def sigmoid(x):
    """`sigmoid(x)` and its derivative."""
    small = exp_below_zero(-tl.abs(x))
    total = 1.0 + small
    return tl.where(x < 0, small, 1.0) / total, small / (total * total)


@triton.jit
def log_odds(mean):
    """`log p - log(1 - p)` for `mean = log p`, and its derivative. A p that rounds to 1 counts as the number before it."""
    epsilon = 1.1920928955078125e-07
    certain = mean > -epsilon
    mean = tl.where(certain, -epsilon, mean)
    p = exp_below_zero(mean)
    # 1 - p: near p = 1 by the series of exp(x) - 1, which does not cancel.
    series = 2.4801587e-5 * mean + 1.9841270e-4
    series = series * mean + 1.3888889e-3
    series = series * mean + 8.3333333e-3
    series = series * mean + 4.1666667e-2
    series = series * mean + 1.6666667e-1
    series = series * mean + 0.5
    series = series * mean + 1.0
    near = mean > -0.5
    other = tl.where(near, -mean * series, 1.0 - p)
    # log(1 - p): far from p = 1 by the series of log(1 - p), which is exact where 1 - p rounds to 1.
    logarithm = tl.where(near, tl.log(other), -2.0 * _atanh(p / (2.0 - p)))
    return mean - logarithm, tl.where(certain, 0.0, 1.0 / other)


@triton.jit
def exp_below_zero(x):
    """`exp(x)` for x up to 0."""
    x = tl.where(x < -104.0, -104.0, x)  # 0 in float32
    whole = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = x - whole * 0.693359375 + whole * 2.12194440e-4  # ln 2 in two pieces, the first exact times `whole`
    series = 1.9841270e-4 * rest + 1.3888889e-3
    series = series * rest + 8.3333333e-3
    series = series * rest + 4.1666667e-2
    series = series * rest + 1.6666667e-1
    series = series * rest + 0.5
    series = series * rest + 1.0
    series = series * rest + 1.0
    return series * tl.exp2(whole)


@triton.jit
def log1p(x):
    """`log(1 + x)` for x in [0, 1]."""
    return 2.0 * _atanh(x / (2.0 + x))


@triton.jit
def _atanh(x):
    """For x in [0, 0.44]."""
    square = x * x
    series = 4.7619048e-2 * square + 5.2631579e-2
    series = series * square + 5.8823529e-2
    series = series * square + 6.6666667e-2
    series = series * square + 7.6923077e-2
    series = series * square + 9.0909091e-2
    series = series * square + 1.1111111e-1
    series = series * square + 1.4285714e-1
    series = series * square + 0.2
    series = series * square + 3.3333333e-1
    return x + x * square * series
