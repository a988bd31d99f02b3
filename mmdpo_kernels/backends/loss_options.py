"""What backends of `preference_loss` are given, and what is where in what they write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..loss_terms import Term


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
