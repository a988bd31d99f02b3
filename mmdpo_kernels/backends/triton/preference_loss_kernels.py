"""The kernel of `preference_loss`: one program goes from log-probabilities to losses, metrics and the gradient.

One program, because some terms look at the whole batch, and a batch is small: what counts is the number of launches.

Terms come in flat tuples. What they are is known when the kernel is compiled: term t is of loss LOSS_OF[t] and has link LINKS[t]; value v is one
of term TERM_OF[v], of kind KINDS[v] and of the branch in column COLUMNS[v]. Their numbers come at run time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .preference_loss_device import linked, log_odds
from .preference_loss_tokens_device import read_response, shortest_of, spread, starts_of

RATIO = tl.constexpr(0)  # in the order of VALUES
MEAN_RATIO = tl.constexpr(1)
LOGP = tl.constexpr(2)
MEAN_LOGP = tl.constexpr(3)
LOG_ODDS = tl.constexpr(4)
BATCH_RATIO = tl.constexpr(5)
BATCH_LOGP = tl.constexpr(6)


@triton.jit(do_not_specialize=("batch", "elements"))
def loss_kernel(
    policy,  # (R,) tokens, or without lengths (K B,) sums
    reference,  # as policy, or with REFERENCE_IS_SUMS (K B,); None: zeros
    lengths,  # (B, K); None: sums
    weights,  # (R,) or None
    counts,  # (K B,) or None
    loss,  # ()
    gradient,  # as policy; None: not wanted
    table,  # (rows, B), see `TableRows`
    batch,  # B
    elements,  # of policy
    beta,
    loss_weights,  # one a loss
    term_weights,  # one a term
    scales,
    offsets,
    shares,  # loss weight * term weight * scale
    coefficients,  # one a value
    LOSS_OF: tl.constexpr,
    LINKS: tl.constexpr,
    TERM_OF: tl.constexpr,
    KINDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BATCHED: tl.constexpr,  # of each branch: whether a term looks at the batch's
    BRANCHES: tl.constexpr,
    CHOSEN: tl.constexpr,  # columns of the branches that metrics compare
    REJECTED: tl.constexpr,
    REFERENCE_IS_SUMS: tl.constexpr,
    LENGTH_NORMALISED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    arrays = (policy, reference, lengths, weights, counts, batch, elements)
    statistics = ()
    for k in tl.static_range(BRANCHES):
        of_batch = _statistics(arrays, k, BATCHED[k], BRANCHES, REFERENCE_IS_SUMS, LENGTH_NORMALISED, BLOCK_B, BLOCK_T)
        statistics = statistics + (of_batch,)  # type: ignore[assignment]
    totals = tl.zeros((BLOCK_B,), tl.float32)
    before = tl.zeros((), tl.int64)
    shortest = tl.zeros((), tl.int64)
    for first in range(0, batch, BLOCK_B):
        record = first + tl.arange(0, BLOCK_B)
        there = record < batch
        start, before = starts_of(lengths, record, there, before, BRANCHES)
        if lengths is not None:
            shortest = tl.minimum(shortest, shortest_of(lengths, record, there, BRANCHES))
        # What is not finite must show, also where a loss levels out or does not look.
        total = tl.zeros((BLOCK_B,), tl.float32)
        responses = ()
        by = ()  # of each branch the derivative of the loss in its value
        for k in tl.static_range(BRANCHES):
            response = read_response(arrays, record, there, start, k, BRANCHES, REFERENCE_IS_SUMS, BLOCK_B, BLOCK_T)
            total += 0.0 * response[1]
            responses = responses + (response,)  # type: ignore[assignment]
            by = by + (tl.zeros((BLOCK_B,), tl.float32),)  # type: ignore[assignment]
        row = table + record
        found = tl.zeros((BLOCK_B,), tl.float32)
        for t in tl.static_range(len(LINKS)):
            x = tl.zeros((BLOCK_B,), tl.float32)
            for v in tl.static_range(len(KINDS)):
                if TERM_OF[v] == t:
                    x += coefficients[v] * _value(responses[COLUMNS[v]], statistics[COLUMNS[v]], KINDS[v], LENGTH_NORMALISED)
            value, slope = linked(scales[t] * x + offsets[t], LINKS[t])
            value = term_weights[t] * value
            found = value if t == 0 or LOSS_OF[t] != LOSS_OF[t - 1] else found + value
            by = _add(
                by, shares[t] * slope, coefficients, responses, statistics, batch, t, TERM_OF, KINDS, COLUMNS, BRANCHES,
                LENGTH_NORMALISED,
            )  # fmt: skip
            if t + 1 == len(LINKS) or LOSS_OF[t] != LOSS_OF[t + 1]:
                tl.store(row, found, mask=there)
                row += batch
                total += loss_weights[LOSS_OF[t]] * found
        totals += tl.where(there, total, 0.0)
        _write_metrics(row, responses, there, batch, beta, BRANCHES, CHOSEN, REJECTED, LENGTH_NORMALISED)
        if gradient is not None:
            for k in tl.static_range(BRANCHES):
                share = by[k] / (batch * 1.0) / responses[k][3]
                spread(gradient, share, arrays, record, there, start, k, BRANCHES, BLOCK_B, BLOCK_T)
    mean = tl.sum(totals) / (batch * 1.0)
    if lengths is not None:
        # Nobody could look at them before; a loss of other tokens than those meant must not pass for one.
        mean = tl.where((before == elements) & (shortest >= 0), mean, float("nan"))
    tl.store(loss, mean)


@triton.jit
def _statistics(
    arrays, COLUMN: tl.constexpr, WANTED: tl.constexpr, BRANCHES: tl.constexpr, REFERENCE_IS_SUMS: tl.constexpr,
    LENGTH_NORMALISED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """-> what BATCH_RATIO and BATCH_LOGP are of a branch, and its tokens."""
    if not WANTED:
        return 0.0, 0.0, 1.0
    else:
        ratios = tl.zeros((BLOCK_B,), tl.float32)
        values = tl.zeros((BLOCK_B,), tl.float32)
        tokens = tl.zeros((BLOCK_B,), tl.float32)
        before = tl.zeros((), tl.int64)
        batch = arrays[5]
        for first in range(0, batch, BLOCK_B):
            record = first + tl.arange(0, BLOCK_B)
            there = record < batch
            start, before = starts_of(arrays[2], record, there, before, BRANCHES)
            value, ratio, count, _ = read_response(
                arrays, record, there, start, COLUMN, BRANCHES, REFERENCE_IS_SUMS, BLOCK_B, BLOCK_T
            )
            ratios += tl.where(there, ratio / count if LENGTH_NORMALISED else ratio, 0.0)
            values += tl.where(there, value, 0.0)
            tokens += tl.where(there, count, 0.0)
        mean = tl.sum(ratios) / (batch * 1.0)
        total = tl.sum(tokens)
        return tl.where(mean < 0, 0.0, mean), tl.sum(values) / total, total


@triton.jit
def _value(response, statistics, KIND: tl.constexpr, LENGTH_NORMALISED: tl.constexpr):
    """What a term looks at."""
    value, ratio, count, _ = response
    if KIND == RATIO:
        return ratio / count if LENGTH_NORMALISED else ratio
    elif KIND == MEAN_RATIO:
        return ratio / count
    elif KIND == LOGP:
        return value
    elif KIND == MEAN_LOGP:
        return value / count
    elif KIND == LOG_ODDS:
        return log_odds(value / count)[0]
    else:
        return statistics[0 if KIND == BATCH_RATIO else 1]


@triton.jit
def _add(
    by, slope, coefficients, responses, statistics, batch, TERM: tl.constexpr, TERM_OF: tl.constexpr, KINDS: tl.constexpr,
    COLUMNS: tl.constexpr, BRANCHES: tl.constexpr, LENGTH_NORMALISED: tl.constexpr,
):  # fmt: skip
    """-> `by`, the derivatives in the branches' values, and with them those of a term, whose derivative in the sum of its values is `slope`."""
    sums = ()
    for k in tl.static_range(BRANCHES):
        total = by[k]
        for v in tl.static_range(len(KINDS)):
            if TERM_OF[v] == TERM and COLUMNS[v] == k and KINDS[v] != BATCH_RATIO:
                total += _through(coefficients[v] * slope, responses[k], statistics[k], batch, KINDS[v], LENGTH_NORMALISED)
        sums = sums + (total,)  # type: ignore[assignment]
    return sums


@triton.jit
def _through(slope, response, statistics, batch, KIND: tl.constexpr, LENGTH_NORMALISED: tl.constexpr):
    """A derivative in what a term looks at, as one in the response's value."""
    if KIND == LOGP or (KIND == RATIO and not LENGTH_NORMALISED):
        return slope
    elif KIND == LOG_ODDS:
        return slope * log_odds(response[0] / response[2])[1] / response[2]
    elif KIND == BATCH_LOGP:
        # All records have this one value and so one slope of the link: that of the mean over the batch is `batch` times a record's.
        return slope * (batch * 1.0) / statistics[2]
    else:
        return slope / response[2]


@triton.jit
def _write_metrics(
    row, responses, there, batch, beta, BRANCHES: tl.constexpr, CHOSEN: tl.constexpr, REJECTED: tl.constexpr,
    LENGTH_NORMALISED: tl.constexpr,
):  # fmt: skip
    """What comes after the losses, see `TableRows`."""
    for k in tl.static_range(BRANCHES):
        tl.store(row, beta * _value(responses[k], responses[k], RATIO, LENGTH_NORMALISED), mask=there)
        row += batch
    for k in tl.static_range(BRANCHES):
        tl.store(row, responses[k][0], mask=there)
        row += batch
    up = beta * _value(responses[CHOSEN], responses[CHOSEN], RATIO, LENGTH_NORMALISED)
    down = beta * _value(responses[REJECTED], responses[REJECTED], RATIO, LENGTH_NORMALISED)
    tl.store(row, (up > down).to(tl.float32), mask=there)
    tl.store(row + batch, up - down, mask=there)
