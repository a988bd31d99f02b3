"""Log-probabilities of responses: those of their tokens, or their sums; `sequence_logps` makes the second from the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...backends.layout import accumulation_dtype
from ...backends.reference.preference_loss import check_tokens, response_values
from ..checks import check_tensor


@dataclass(frozen=True, kw_only=True)
class SequenceLogps:
    """Log-probabilities of whole responses, summed over their tokens, under one model."""

    chosen: Tensor
    """(B,) floating."""
    rejected: Tensor
    """(B,) floating."""
    corrupted: Tensor | None = None
    """(B,) floating: the chosen response under the corrupted picture."""
    chosen_lengths: Tensor | None = None
    """(B,) response tokens; needed by `length_normalised` and by the losses in `NEEDS_LENGTHS`. Only the policy's are looked at."""
    rejected_lengths: Tensor | None = None
    """(B,) response tokens; as `chosen_lengths`."""
    corrupted_lengths: Tensor | None = None
    """(B,) response tokens, used by `length_normalised`; None: those of the chosen response, which it is."""


@dataclass(frozen=True, kw_only=True)
class TokenLogps:
    """Log-probabilities of the tokens of all responses, under one model: response after response, record by record."""

    logps: Tensor
    """(R,) floating."""
    lengths: Tensor
    """(B, K) integers: tokens of each record's responses. Of the reference's they must be the policy's."""
    branches: tuple[str, ...] = ("chosen", "rejected")
    """What the K responses of a record are, in their order: "chosen", "rejected", maybe "corrupted", and others that a loss looks at by
    these names."""
    weights: Tensor | None = None
    """(R,) weights of the tokens, which make a response count with their weighted mean as in `sequence_logps`; None: with their sum. The
    policy's are the reference's too."""


def sequence_logps(token_logps: Tensor, lengths: Sequence[int] | Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Log-probabilities of responses from those of their tokens, which lie one response after another.

    Without weights the sums. With weights the weighted means of DDPO (RLHF-V, arXiv 2312.00849),
    `sum(weights * token_logps) / sum(weights)`: with weight 1 for a token that a correction left as it was and gamma for one that it
    changed, the divisor is the paper's N = |unchanged| + gamma |changed|. Being means, these ask for no `length_normalised`, for a
    larger beta, and for losses outside `NEEDS_LENGTHS`. Equivalent PyTorch without weights:
    `torch.stack([piece.sum() for piece in token_logps.split(lengths)])`. `preference_loss` does the same by itself, where it is given
    `TokenLogps`.

    Args:
        token_logps: (R,) floating; a gradient flows through it.
        lengths: n token counts that sum to R; a tensor on a GPU is waited for.
        weights: (R,), at least 0, not all 0 in a response.

    Returns:
        (n,) in float32 at least; 0 for a response without tokens.

    Raises:
        TypeError, ValueError: shapes that do not fit.
    """
    op = "sequence_logps"
    check_tensor(op, "token_logps", token_logps, ("R",), floating=True)
    counts = [int(length) for length in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]
    values = wide(token_logps)
    if weights is not None:
        check_tensor(op, "weights", weights, (token_logps.shape[0],))
        weights = weights.to(values)
    check_tokens(op, token_logps.shape[0], counts, weights)
    return response_values(values, counts, weights)


def wide(values: Tensor) -> Tensor:
    """float32 at least: half precision would round sums over long responses."""
    return values if values.dtype in (torch.float32, torch.float64) else values.to(accumulation_dtype(values.dtype))
