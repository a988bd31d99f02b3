"""Device functions that the kernels of both attention ops share: addresses, the tree rule."""

from __future__ import annotations

import triton
import triton.language as tl

COLUMNS = tl.constexpr(16)
"""Segments that one pass adds up: the narrowest tile that tensor cores take."""


@triton.jit
def offset(i, stride):
    """i * stride in 64 bits: a batch row may lie further than 32 bits reach."""
    return i.to(tl.int64) * stride


@triton.jit
def sees(rows, lasts, keys, ends, row_depths, key_depths, window):
    """Whether query `rows` see `keys`, in shapes that broadcast; depths count with a window.

    lasts: the last key within each row's reach, causally the row itself. ends: of the keys' subtrees, None: all reach the end.
    """
    seen = keys <= lasts
    if ends is not None:
        seen &= rows < ends
    if window is not None:
        seen &= row_depths - key_depths < window
    return seen
