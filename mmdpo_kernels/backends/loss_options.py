"""What backends of `preference_loss` are given, and what is where in what they write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

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


@dataclass(frozen=True, kw_only=True, eq=False)
class LossOptions:
    """Settings of a call. Known by identity, as there is one for each set of options: what backends make of it is kept."""

    names: tuple[str, ...]
    """Each loss once. Of what they are called, backends know nothing."""
    weights: tuple[float, ...]
    """One a name."""
    terms: tuple[tuple[Term, ...], ...]
    """Those of each loss."""
    beta: float
    """Factor of the rewards."""
    length_normalised: bool


class LossArrays(NamedTuple):
    """Log-probabilities of B records with K responses each. Contiguous, on one device, all but `lengths` in the policy's dtype."""

    policy: Tensor
    """With `lengths` (R,), those of tokens, response after response and record by record; without (K B,), sums, branch after branch."""
    reference: Tensor | None
    """As `policy`, or where `reference_is_sums` (K B,); None: zeros. Carries no gradient."""
    reference_is_sums: bool
    lengths: Tensor | None
    """(B, K) int64 token counts."""
    weights: Tensor | None
    """(R,), only with `lengths`: a response counts with its tokens' weighted mean, under both models; None: with their sum."""
    counts: Tensor | None
    """(K B,) token counts, only without `lengths`; None: no loss asks for them."""
    branches: tuple[str, ...]
    """The K responses in their order, each once: "chosen", "rejected" and all that the terms look at."""
    batch: int


class TableRows(NamedTuple):
    """The rows, (B,) each, of the table that a backend writes: first the losses in the order of `LossOptions.names`."""

    rewards: int
    """The first of K: beta times the ratio that losses see."""
    logps: int
    """The first of K: what the policy's responses count with."""
    accuracy: int
    """1 where the chosen reward is above the rejected one."""
    margin: int
    """Chosen minus rejected reward."""


def table_rows(losses: int, branches: int) -> TableRows:
    """Where things are in a table of so many losses and branches."""
    end = table_size(losses, branches)
    return TableRows(losses, losses + branches, end - 2, end - 1)


def table_size(losses: int, branches: int) -> int:
    """How many rows it has."""
    return losses + 2 * branches + 2
