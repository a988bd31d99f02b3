"""What losses are made of: terms, the values of branches that they look at, and the links that they end in."""

from __future__ import annotations

from typing import NamedTuple

BRANCHES = ("chosen", "rejected", "corrupted")
"""The responses that `SequenceLogps` has names for: the last is the chosen one under the corrupted picture."""

LINKS = ("minus_log_sigmoid", "hinge", "square", "sigmoid", "identity")
"""What a term makes of its argument x: `-log sigmoid(x)`, `max(0, 1 - x)`, `x^2`, `sigmoid(x)`, `x`."""

VALUES = ("ratio", "mean_ratio", "logp", "mean_logp", "log_odds", "batch_ratio", "batch_logp")
"""What a term may look at of a branch; l is the policy's log-probability of the response, l_ref the reference's, n its tokens:

- `ratio`: l - l_ref; with `length_normalised` (l - l_ref) / n.
- `mean_ratio`: (l - l_ref) / n.
- `logp`, `mean_logp`: l, l / n.
- `log_odds`: log p - log(1 - p) with log p = l / n. A p that rounds to 1 counts as the number before it.
- `batch_ratio`: max(0, mean of `ratio` over the batch), a constant to the gradient.
- `batch_logp`: sum of l over the batch, divided by that of n.
"""

REFERENCE_VALUES = frozenset({"ratio", "mean_ratio", "batch_ratio"})
"""Those that look at the reference model."""
TOKEN_VALUES = frozenset({"mean_ratio", "mean_logp", "log_odds", "batch_logp"})
"""Those that need token counts whatever the options are."""
BATCH_VALUES = frozenset({"batch_ratio", "batch_logp"})
"""Those that are one number for all records."""


class Value(NamedTuple):
    """One summand of a term's argument: `coefficient * kind(branch)`."""

    kind: str
    """Of VALUES."""
    branch: str
    coefficient: float = 1.0


class Term(NamedTuple):
    """`weight * link(scale * sum_j coefficient_j value_j + offset)` of each record; a loss is the sum of a few."""

    link: str
    """Of LINKS."""
    values: tuple[Value, ...]
    scale: float = 1.0
    offset: float = 0.0
    weight: float = 1.0
