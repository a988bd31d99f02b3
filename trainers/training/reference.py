"""The reference model's log-probabilities during training: read from a cache, or run beside the policy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmdpo_kernels import SequenceLogps, TokenLogps
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.training import head, model_parts
from mmdpo_trainers.training.collator import PreferenceBatch
from mmdpo_trainers.training.reference_cache import ReferenceCache

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


class Reference:
    """The policy with its adapter switched off, or a second model.

    Args:
        policy: the trained model.
        second: the reference where it is a model of its own, else None.
        shares_features: whether policy and reference see pictures through one and the same frozen tower.
        shares_head: whether they have one and the same frozen head.
        autocast: the context that the policy's forward passes run in.
    """

    def __init__(
        self, policy: nn.Module, second: nn.Module | None, *, shares_features: bool, shares_head: bool, autocast: Autocast
    ) -> None:
        self.policy, self.second, self.autocast = policy, second, autocast
        self.shares_features, self.shares_head = shares_features, shares_head
        self.cache: ReferenceCache | None = None

    @property
    def model(self) -> nn.Module:
        """The module that `active` makes the reference."""
        return self.policy if self.second is None else self.second

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """While it lasts, `model` computes the reference."""
        return contextlib.nullcontext() if self.second is not None else model_parts.adapter_off(self.policy)  # type: ignore[arg-type]

    @torch.no_grad()
    def logps(self, batch: PreferenceBatch, features: list[Tensor] | None) -> SequenceLogps | TokenLogps:
        """Log-probabilities of a batch. features: the policy's of this batch, used where they are the reference's too."""
        if self.cache is not None:
            gone = [name for name, key in zip(batch.ids, batch.keys, strict=True) if key not in self.cache]
            if gone:
                raise DataError(
                    f"record {gone[0]}: text or pictures changed since the reference was run over it; restore the file, or start again, "
                    "which runs the reference over what changed"
                )
            found = [self.cache.get(key) for key in batch.keys]
            device = batch.input_ids.device
            columns = {name: [logps[name] for logps in found] for name in batch.branches}
            return SequenceLogps(**{name: torch.tensor(v, dtype=torch.float64, device=device) for name, v in columns.items()})
        with self.active():
            return batch.token_logps(head.token_logps(self.model, self.rows(batch, features), batch))

    @property
    def scored_beside_policy(self) -> bool:
        """Whether the head is to score `rows` in the policy's own products, in place of `logps`."""
        return self.cache is None and self.shares_head

    @torch.no_grad()
    def rows(self, batch: PreferenceBatch, features: list[Tensor] | None) -> Tensor:
        """(U, H) hidden states that predict response tokens, see `head.scored_rows`. features: as in `logps`."""
        with self.active(), self.autocast():
            if features is None or not self.shares_features:
                features = model_parts.picture_features(self.model, batch)
            return head.scored_rows(model_parts.hidden_states(self.model, batch, features), batch)
