"""Rows of hidden states that predict several tokens, scored once for all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...backends.layout import accumulation_dtype
from ...backends.logit_options import LogitOptions
from ...backends.reference.linear_logprobs import logits_of
from ...backends.registry import resolve


@dataclass(frozen=True, kw_only=True)
class SharedRows:
    """(row, target) pairs, of which several may have one row: branches of a token tree share their parent's rows.

    `linear_logprobs` gives each row its first target; `spread` then gives every pair its own.
    """

    rows: Tensor
    """(U,) int64: the distinct rows."""
    targets: Tensor
    """(U,) int64: the first target of each."""
    further_rows: Tensor
    """(E,) int64: of each further pair, the index of its row in `rows`."""
    further_targets: Tensor
    """(E,) int64."""
    order: Tensor
    """(R,) int64, R = U + E: where each pair stands among the U first and the E further ones."""

    @classmethod
    def from_pairs(cls, rows: Tensor, targets: Tensor) -> SharedRows:
        """rows, targets: (R,) integers on the CPU, none to be ignored; equal pairs are allowed."""
        distinct, places = torch.unique(rows, return_inverse=True)
        count, pairs = distinct.shape[0], torch.arange(rows.shape[0])
        first = torch.full((count,), rows.shape[0]).scatter_reduce(0, places, pairs, "amin")
        further = pairs != first[places]
        order = torch.where(further, count - 1 + further.cumsum(0), places)
        return cls(
            rows=distinct,
            targets=targets[first],
            further_rows=places[further],
            further_targets=targets[further],
            order=order,
        )

    @property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """(R,) index in `rows` and (R,) target of every pair, in their order."""
        own = torch.arange(self.rows.shape[0], device=self.rows.device)
        return torch.cat((own, self.further_rows))[self.order], torch.cat((self.targets, self.further_targets))[self.order]

    def spread(
        self,
        logps: Tensor,  # (U,)
        hidden: Tensor,  # (U, H)
        weight: Tensor,  # (V, H)
        *,
        bias: Tensor | None = None,  # (V,)
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        backend: str = "auto",
    ) -> Tensor:
        """(R,) log-probabilities of all pairs, in their order, from those of the first targets; options as `linear_logprobs` had them.

        A further target's is the first one's plus the difference of their logits, two dot products a pair; exact, and differentiable in
        the log-probabilities and in hidden. Weight and bias are taken to be frozen: trained ones would get whole gradients of their own here.
        """
        options = LogitOptions(softcap, logit_scale, temperature, ignore_index=-1)
        wide = accumulation_dtype(hidden.dtype)
        # The log-sum-exp inside a log-probability is of logits as the backend rounds them. Rounded alike, that cancels where the further
        # target is the likeliest token; else its log-probability could end up above 0.
        rounded = resolve("linear_logprobs", backend, hidden.device, hidden.dtype).logit_dtype(hidden)
        rows = hidden[self.further_rows].to(wide)

        def logits(targets: Tensor) -> Tensor:
            products = (rows * weight.detach()[targets].to(wide)).sum(-1)
            if bias is not None:
                products = products + bias.detach()[targets].to(wide)
            products = products + (products.to(rounded).to(wide) - products).detach()
            return logits_of(products, options)

        differences = logits(self.further_targets) - logits(self.targets[self.further_rows])
        return torch.cat((logps, logps[self.further_rows] + differences))[self.order]
