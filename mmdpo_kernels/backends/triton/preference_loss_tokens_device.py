"""The tokens of responses, read and written by the program of `preference_loss`.

`arrays` are policy, reference, lengths, weights, counts, the number of records and that of the policy's elements, as `LossArrays` has them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def starts_of(lengths, record, there, before, BRANCHES: tl.constexpr):
    """The place of each record's first token, and the number of tokens up to the end of these records."""
    tokens = tl.zeros_like(record).to(tl.int64)
    if lengths is not None:
        for branch in tl.static_range(BRANCHES):
            tokens += tl.load(lengths + record * BRANCHES + branch, mask=there, other=0)
    return before + tl.cumsum(tokens, 0) - tokens, before + tl.sum(tokens)


@triton.jit
def shortest_of(lengths, record, there, BRANCHES: tl.constexpr):
    shortest = tl.load(lengths + record * BRANCHES, mask=there, other=0)
    for branch in tl.static_range(1, BRANCHES):
        shortest = tl.minimum(shortest, tl.load(lengths + record * BRANCHES + branch, mask=there, other=0))
    return tl.min(shortest)


@triton.jit
def _span(lengths, record, there, start, COLUMN: tl.constexpr, BRANCHES: tl.constexpr):
    """Where the tokens of the records' response in this column are: the first, and how many."""
    for branch in tl.static_range(COLUMN):
        start += tl.load(lengths + record * BRANCHES + branch, mask=there, other=0)
    return start.to(tl.int32), tl.load(lengths + record * BRANCHES + COLUMN, mask=there, other=0).to(tl.int32)


@triton.jit
def read_response(
    arrays, record, there, start, COLUMN: tl.constexpr, BRANCHES: tl.constexpr, REFERENCE_IS_SUMS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """-> the policy's value, that minus the reference's, tokens, and what sums over tokens were divided by."""
    policy, reference, lengths, weights, counts, batch, elements = arrays
    place = record + COLUMN * batch
    base = tl.zeros((BLOCK_B,), tl.float32)
    scale = tl.full((BLOCK_B,), 1.0, tl.float32)
    if lengths is None:
        value = tl.load(policy + place, mask=there, other=0.0)
        count = scale
        if counts is not None:
            count = tl.load(counts + place, mask=there, other=1.0)
    else:
        start, length = _span(lengths, record, there, start, COLUMN, BRANCHES)
        count = tl.where(there, length.to(tl.float32), 1.0)
        value = tl.zeros((BLOCK_B,), tl.float32)
        sum_of_weights = tl.zeros((BLOCK_B,), tl.float32)
        for first in range(0, tl.max(length), BLOCK_T):
            token = start[:, None] + (first + tl.arange(0, BLOCK_T))[None, :]
            inside = (token < (start + length)[:, None]) & (token >= 0) & (token < elements)
            weight = 1.0
            if weights is not None:
                weight = tl.load(weights + token, mask=inside, other=0.0)
                sum_of_weights += tl.sum(weight, 1)
            value += tl.sum(weight * tl.load(policy + token, mask=inside, other=0.0), 1)
            if reference is not None and not REFERENCE_IS_SUMS:
                base += tl.sum(weight * tl.load(reference + token, mask=inside, other=0.0), 1)
        if weights is not None:
            scale = tl.where(sum_of_weights == 0, 1.0, sum_of_weights)
            value = value / scale
            base = base / scale
    if reference is not None and (lengths is None or REFERENCE_IS_SUMS):
        base = tl.load(reference + place, mask=there, other=0.0)
    return value, value - base, count, scale


@triton.jit
def spread(
    gradient, slope, arrays, record, there, start, COLUMN: tl.constexpr, BRANCHES: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write what the tokens of a response share, each times its weight."""
    _, _, lengths, weights, _, batch, elements = arrays
    if lengths is None:
        tl.store(gradient + record + COLUMN * batch, slope, mask=there)
    else:
        start, length = _span(lengths, record, there, start, COLUMN, BRANCHES)
        for first in range(0, tl.max(length), BLOCK_T):
            token = start[:, None] + (first + tl.arange(0, BLOCK_T))[None, :]
            inside = (token < (start + length)[:, None]) & (token >= 0) & (token < elements)
            share = slope[:, None] + tl.zeros((BLOCK_B, BLOCK_T), tl.float32)
            if weights is not None:
                share = share * tl.load(weights + token, mask=inside, other=0.0)
            tl.store(gradient + token, share, mask=inside)
