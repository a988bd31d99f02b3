"""Device functions with one meaning, compiled or interpreted: casts, dot products, softcaps."""

from __future__ import annotations

import triton
import triton.language as tl

from .runtime import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """`x.to(dtype)` of float32, rounded to nearest; the interpreter on its own cuts bfloat16's missing bits off."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc=None):
    """float32 `a @ b (+ acc)`; float32 operands are not rounded. The interpreter would multiply the bits of bfloat16."""
    if _INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def dot_exact(a, b, acc):
    """`dot` of a float32 operand, either of the two, with small integers in bfloat16.

    Three bfloat16 pieces hold all bits of a float32, so tensor cores lose none.
    """
    for _ in tl.static_range(3):
        if a.dtype == tl.float32:
            piece = narrow(a, tl.bfloat16)
            acc = dot(piece, b, acc)
            a -= piece.to(tl.float32)
        else:
            piece = narrow(b, tl.bfloat16)
            acc = dot(a, piece, acc)
            b -= piece.to(tl.float32)
    return acc


@triton.jit
def tanh(x):
    """Accurate to float32 also near zero, where `1 - 2 / (exp(2 x) + 1)` cancels and a polynomial takes over."""
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(size * 2.885390081777927) + 1.0)  # 2 log2(e)
    square = x * x
    # Chebyshev fit of (tanh(x) / x - 1) / x^2 over |x| < 0.55.
    near = -0.00659731
    near = near * square + 0.02130293
    near = near * square - 0.05390847
    near = near * square + 0.1333311
    near = near * square - 0.33333332
    return tl.where(size < 0.55, x + x * square * near, tl.where(x < 0.0, -far, far))


@triton.jit
def tanh_slope(y):
    """Derivative of `y = tanh(x)` in x."""
    return 1.0 - y * y


@triton.jit
def tanh_slope_at(x):
    """Derivative of `tanh(x)` in x, from the exponential: where tanh is too near 1 to tell."""
    e = tl.exp2(tl.abs(x) * -2.885390081777927)  # 2 log2(e)
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def capped(x, inner, SOFTCAP: tl.constexpr):
    """`tanh(inner x)` under a softcap, else `inner x`; inner None: 1. What both are times the factor `outer` is left to the caller."""
    if inner is not None:
        x *= inner
    if SOFTCAP:
        x = tanh(x)
    return x
