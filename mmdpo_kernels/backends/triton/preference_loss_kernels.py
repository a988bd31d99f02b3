"""The kernel of `preference_loss`: one program goes from log-probabilities to losses, metrics and the gradient.

One program, because `nll` and `kto_pair` look at the whole batch, and a batch is small: what counts is the number of launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .preference_loss_functions import log_odds, minus_log_sigmoid, sigmoid


@triton.jit(do_not_specialize=("batch", "elements"))
def loss_kernel(
    policy,
    reference,
    lengths,
    weights,
    counts,
    loss,
    gradient,
    table,
    batch,
    elements,
    beta,
    label_smoothing,
    anchor,
    simpo_gamma,
    bco_shift,
    sigmoid_weight,
    hinge_weight,
    ipo_weight,
    cdpo_weight,
    robust_weight,
    simpo_weight,
    orpo_weight,
    bco_pair_weight,
    kto_pair_weight,
    nll_weight,
    copo_weight,
    ancpo_weight,
    SIGMOID: tl.constexpr,  # rows of the table, None: not asked for
    HINGE: tl.constexpr,
    IPO: tl.constexpr,
    CDPO: tl.constexpr,
    ROBUST: tl.constexpr,
    SIMPO: tl.constexpr,
    ORPO: tl.constexpr,
    BCO_PAIR: tl.constexpr,
    KTO_PAIR: tl.constexpr,
    NLL: tl.constexpr,
    COPO: tl.constexpr,
    ANCPO: tl.constexpr,
    ANCHOR_CHOSEN: tl.constexpr,
    ANCHOR_REJECTED: tl.constexpr,
    ANCHOR_CORRUPTED: tl.constexpr,
    BRANCHES: tl.constexpr,
    CHOSEN: tl.constexpr,  # columns of the branches
    REJECTED: tl.constexpr,
    CORRUPTED: tl.constexpr,  # None: not there
    REFERENCE_IS_SUMS: tl.constexpr,
    LENGTH_NORMALISED: tl.constexpr,
    REWARDS: tl.constexpr,  # rows of the table, see `TableRows`
    LOGPS: tl.constexpr,
    ACCURACY: tl.constexpr,
    MARGIN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    records = batch * 1.0
    # What losses know of the whole batch: kto_pair the mean ratios, of which those below 0 count as 0; nll the chosen tokens and their sum.
    mean_chosen = 0.0
    mean_rejected = 0.0
    chosen_tokens = 1.0
    mean_nll = 0.0
    if KTO_PAIR is not None or NLL is not None:
        sums = tl.zeros((BLOCK_B,), tl.float32)
        tokens = tl.zeros((BLOCK_B,), tl.float32)
        chosen_sums = tl.zeros((BLOCK_B,), tl.float32)
        rejected_sums = tl.zeros((BLOCK_B,), tl.float32)
        before = tl.zeros((), tl.int64)
        for first in range(0, batch, BLOCK_B):
            record = first + tl.arange(0, BLOCK_B)
            there = record < batch
            start, before = _starts(lengths, record, there, before, BRANCHES)
            value, ratio, count, _ = _response(
                policy, reference, lengths, weights, counts, record, there, start, batch, elements,
                CHOSEN, BRANCHES, REFERENCE_IS_SUMS, BLOCK_B, BLOCK_T,
            )  # fmt: skip
            sums += tl.where(there, value, 0.0)
            tokens += tl.where(there, count, 0.0)
            if KTO_PAIR is not None:
                chosen_sums += tl.where(there, _seen(ratio, count, LENGTH_NORMALISED), 0.0)
                value, ratio, count, _ = _response(
                    policy, reference, lengths, weights, counts, record, there, start, batch, elements,
                    REJECTED, BRANCHES, REFERENCE_IS_SUMS, BLOCK_B, BLOCK_T,
                )  # fmt: skip
                rejected_sums += tl.where(there, _seen(ratio, count, LENGTH_NORMALISED), 0.0)
        chosen_tokens = tl.sum(tokens)
        mean_nll = -tl.sum(sums) / chosen_tokens
        mean_chosen = tl.sum(chosen_sums) / records
        mean_chosen = tl.where(mean_chosen < 0, 0.0, mean_chosen)
        mean_rejected = tl.sum(rejected_sums) / records
        mean_rejected = tl.where(mean_rejected < 0, 0.0, mean_rejected)

    totals = tl.zeros((BLOCK_B,), tl.float32)
    before = tl.zeros((), tl.int64)
    shortest = tl.zeros((), tl.int64)
    for first in range(0, batch, BLOCK_B):
        record = first + tl.arange(0, BLOCK_B)
        there = record < batch
        start, before = _starts(lengths, record, there, before, BRANCHES)
        if lengths is not None:
            shortest = tl.minimum(shortest, _shortest(lengths, record, there, BRANCHES))
        w_value, w_ratio, w_count, w_scale = _response(
            policy, reference, lengths, weights, counts, record, there, start, batch, elements,
            CHOSEN, BRANCHES, REFERENCE_IS_SUMS, BLOCK_B, BLOCK_T,
        )  # fmt: skip
        l_value, l_ratio, l_count, l_scale = _response(
            policy, reference, lengths, weights, counts, record, there, start, batch, elements,
            REJECTED, BRANCHES, REFERENCE_IS_SUMS, BLOCK_B, BLOCK_T,
        )  # fmt: skip
        w = _seen(w_ratio, w_count, LENGTH_NORMALISED)
        l = _seen(l_ratio, l_count, LENGTH_NORMALISED)  # noqa: E741 - the name of the equations
        row = table + record
        # What is not finite must show, also where a loss levels out or does not look.
        total = 0.0 * w_ratio + 0.0 * l_ratio
        # Derivatives in w, l and c as losses see them; with _mean in the ratios divided by the counts, with _value in the values.
        by_w = tl.zeros((BLOCK_B,), tl.float32)
        by_l = tl.zeros((BLOCK_B,), tl.float32)
        by_c = tl.zeros((BLOCK_B,), tl.float32)
        by_w_mean = tl.zeros((BLOCK_B,), tl.float32)
        by_l_mean = tl.zeros((BLOCK_B,), tl.float32)
        by_w_value = tl.zeros((BLOCK_B,), tl.float32)
        by_l_value = tl.zeros((BLOCK_B,), tl.float32)
        margin = beta * (w - l)

        if SIGMOID is not None:
            found, slope = minus_log_sigmoid(margin)
            tl.store(row + SIGMOID * batch, found, mask=there)
            total += sigmoid_weight * found
            by_w += sigmoid_weight * beta * slope
            by_l -= sigmoid_weight * beta * slope
        if HINGE is not None:
            distance = 1.0 - margin
            found = tl.where(distance < 0, 0.0, distance)
            tl.store(row + HINGE * batch, found, mask=there)
            total += hinge_weight * found
            slope = tl.where(distance > 0, hinge_weight * beta, 0.0)
            by_w -= slope
            by_l += slope
        if IPO is not None:
            distance = w_ratio / w_count - l_ratio / l_count - 0.5 / beta
            tl.store(row + IPO * batch, distance * distance, mask=there)
            total += ipo_weight * distance * distance
            by_w_mean += 2.0 * ipo_weight * distance
            by_l_mean -= 2.0 * ipo_weight * distance
        if CDPO is not None or ROBUST is not None:
            clean, clean_slope = minus_log_sigmoid(margin)
            flipped, flipped_slope = minus_log_sigmoid(-margin)
            if CDPO is not None:
                found = (1.0 - label_smoothing) * clean + label_smoothing * flipped
                slope = (1.0 - label_smoothing) * clean_slope - label_smoothing * flipped_slope
                tl.store(row + CDPO * batch, found, mask=there)
                total += cdpo_weight * found
                by_w += cdpo_weight * beta * slope
                by_l -= cdpo_weight * beta * slope
            if ROBUST is not None:
                scale = 1.0 / (1.0 - 2.0 * label_smoothing)
                found = ((1.0 - label_smoothing) * clean - label_smoothing * flipped) * scale
                slope = ((1.0 - label_smoothing) * clean_slope + label_smoothing * flipped_slope) * scale
                tl.store(row + ROBUST * batch, found, mask=there)
                total += robust_weight * found
                by_w += robust_weight * beta * slope
                by_l -= robust_weight * beta * slope
        if SIMPO is not None:
            found, slope = minus_log_sigmoid(beta * (w_value / w_count - l_value / l_count) - simpo_gamma)
            tl.store(row + SIMPO * batch, found, mask=there)
            total += simpo_weight * found
            by_w_value += simpo_weight * beta * slope / w_count
            by_l_value -= simpo_weight * beta * slope / l_count
        if ORPO is not None:
            w_odds, w_slope = log_odds(w_value / w_count)
            l_odds, l_slope = log_odds(l_value / l_count)
            found, slope = minus_log_sigmoid(w_odds - l_odds)
            tl.store(row + ORPO * batch, beta * found, mask=there)
            total += orpo_weight * beta * found
            by_w_value += orpo_weight * beta * slope * w_slope / w_count
            by_l_value -= orpo_weight * beta * slope * l_slope / l_count
        if BCO_PAIR is not None:
            above, above_slope = minus_log_sigmoid(beta * w - bco_shift)
            below, below_slope = minus_log_sigmoid(bco_shift - beta * l)
            tl.store(row + BCO_PAIR * batch, above + below, mask=there)
            total += bco_pair_weight * (above + below)
            by_w += bco_pair_weight * beta * above_slope
            by_l -= bco_pair_weight * beta * below_slope
        if KTO_PAIR is not None:
            above, above_slope = sigmoid(beta * (mean_rejected - w))
            below, below_slope = sigmoid(beta * (l - mean_chosen))
            tl.store(row + KTO_PAIR * batch, 0.5 * (above + below), mask=there)
            total += kto_pair_weight * 0.5 * (above + below)
            by_w -= kto_pair_weight * 0.5 * beta * above_slope
            by_l += kto_pair_weight * 0.5 * beta * below_slope
        if NLL is not None:
            tl.store(row + NLL * batch, mean_nll + tl.zeros((BLOCK_B,), tl.float32), mask=there)
            total += nll_weight * mean_nll
            by_w_value -= nll_weight * records / chosen_tokens
        if ANCPO is not None:
            anchored = tl.zeros((BLOCK_B,), tl.float32)
            if ANCHOR_CHOSEN:
                found, slope = minus_log_sigmoid(beta * w - anchor)
                anchored += found
                by_w += ancpo_weight * beta * slope
            if ANCHOR_REJECTED:
                found, slope = minus_log_sigmoid(anchor - beta * l)
                anchored += found
                by_l -= ancpo_weight * beta * slope

        tl.store(row + (REWARDS + CHOSEN) * batch, beta * w, mask=there)
        tl.store(row + (REWARDS + REJECTED) * batch, beta * l, mask=there)
        tl.store(row + (LOGPS + CHOSEN) * batch, w_value, mask=there)
        tl.store(row + (LOGPS + REJECTED) * batch, l_value, mask=there)
        tl.store(row + ACCURACY * batch, (beta * w > beta * l).to(tl.float32), mask=there)
        tl.store(row + MARGIN * batch, beta * w - beta * l, mask=there)

        if CORRUPTED is not None:
            c_value, c_ratio, c_count, c_scale = _response(
                policy, reference, lengths, weights, counts, record, there, start, batch, elements,
                CORRUPTED, BRANCHES, REFERENCE_IS_SUMS, BLOCK_B, BLOCK_T,
            )  # fmt: skip
            c = _seen(c_ratio, c_count, LENGTH_NORMALISED)
            total += 0.0 * c_ratio
            tl.store(row + (REWARDS + CORRUPTED) * batch, beta * c, mask=there)
            tl.store(row + (LOGPS + CORRUPTED) * batch, c_value, mask=there)
            if COPO is not None:
                found, slope = minus_log_sigmoid(beta * (w - c))
                tl.store(row + COPO * batch, found, mask=there)
                total += copo_weight * found
                by_w += copo_weight * beta * slope
                by_c -= copo_weight * beta * slope
            if ANCPO is not None and ANCHOR_CORRUPTED:
                found, slope = minus_log_sigmoid(anchor - beta * c)
                anchored += found
                by_c -= ancpo_weight * beta * slope
            if gradient is not None:
                by_c = _seen(by_c, c_count, LENGTH_NORMALISED) / records
                _spread(
                    gradient, by_c / c_scale, lengths, weights, record, there, start, batch, elements,
                    CORRUPTED, BRANCHES, BLOCK_B, BLOCK_T,
                )  # fmt: skip
        if ANCPO is not None:
            tl.store(row + ANCPO * batch, anchored, mask=there)
            total += ancpo_weight * anchored
        totals += tl.where(there, total, 0.0)
        if gradient is not None:
            by_w = _seen(by_w, w_count, LENGTH_NORMALISED) + by_w_value
            by_l = _seen(by_l, l_count, LENGTH_NORMALISED) + by_l_value
            if IPO is not None:
                by_w += by_w_mean / w_count
                by_l += by_l_mean / l_count
            _spread(
                gradient, by_w / records / w_scale, lengths, weights, record, there, start, batch, elements,
                CHOSEN, BRANCHES, BLOCK_B, BLOCK_T,
            )  # fmt: skip
            _spread(
                gradient, by_l / records / l_scale, lengths, weights, record, there, start, batch, elements,
                REJECTED, BRANCHES, BLOCK_B, BLOCK_T,
            )  # fmt: skip
    mean = tl.sum(totals) / records
    if lengths is not None:
        # Nobody could look at them before; a loss of other tokens than those meant must not pass for one.
        mean = tl.where((before == elements) & (shortest >= 0), mean, float("nan"))
    tl.store(loss, mean)


@triton.jit
def _starts(lengths, record, there, before, BRANCHES: tl.constexpr):
    """The place of each record's first token, and the number of tokens up to the end of these records."""
    tokens = tl.zeros_like(record).to(tl.int64)
    if lengths is not None:
        for branch in tl.static_range(BRANCHES):
            tokens += tl.load(lengths + record * BRANCHES + branch, mask=there, other=0)
    return before + tl.cumsum(tokens, 0) - tokens, before + tl.sum(tokens)


@triton.jit
def _shortest(lengths, record, there, BRANCHES: tl.constexpr):
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
def _response(
    policy, reference, lengths, weights, counts, record, there, start, batch, elements,
    COLUMN: tl.constexpr, BRANCHES: tl.constexpr, REFERENCE_IS_SUMS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """-> the policy's value, that minus the reference's, tokens, and what sums over tokens were divided by."""
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
def _seen(ratio, count, LENGTH_NORMALISED: tl.constexpr):
    if LENGTH_NORMALISED:
        ratio = ratio / count
    return ratio


@triton.jit
def _spread(
    gradient, slope, lengths, weights, record, there, start, batch, elements,
    COLUMN: tl.constexpr, BRANCHES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write what the tokens of a response share, each times its weight."""
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
