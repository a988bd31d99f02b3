"""The reference model's log-probabilities during training: read from a cache, or run beside the policy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmdpo_kernels import SequenceLogps, TokenLogps
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.models.families import EncodedImages
from mmdpo_trainers.training import head, model_parts
from mmdpo_trainers.training.batches.collator import PreferenceBatch
from mmdpo_trainers.training.reference.cache import ReferenceCache
from mmdpo_trainers.training.sharded.sharding import through_root

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


class Reference:
    """The policy with its adapter switched off, or a second model.

    Args:
        policy: the trained model.
        second: the reference where it is a model of its own, else None.
        wrapped: what to call in its place where its weights are in shards.
        shares_features: whether policy and reference see pictures through one and the same frozen tower.
        shares_head: whether they have one and the same frozen head.
        autocast: the context that the policy's forward passes run in.
    """

    def __init__(
        self,
        policy: nn.Module,
        second: nn.Module | None,
        *,
        shares_features: bool,
        shares_head: bool,
        autocast: Autocast,
        wrapped: nn.Module | None = None,
    ) -> None:
        self.policy, self.second, self.autocast = policy, second, autocast
        self.wrapped = wrapped
        self.shares_features, self.shares_head = shares_features, shares_head
        self.cache: ReferenceCache | None = None

    @property
    def model(self) -> nn.Module:
        """The module that `active` makes the reference."""
        return self.policy if self.second is None else self.second

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """While it lasts, `model` computes the reference."""
        return contextlib.nullcontext() if self.second is not None else model_parts.adapter_off(self.policy)  # type: ignore[arg-type]

    def cached(self, batch: PreferenceBatch) -> SequenceLogps | TokenLogps | None:
        """What the cache holds of a batch; None: there is no cache. Raises DataError naming a record that is not in it."""
        if self.cache is None:
            return None
        gone = [name for name, key in zip(batch.ids, batch.keys, strict=True) if key not in self.cache]
        if gone:
            raise DataError(
                f"record {gone[0]}: text or pictures changed since the reference was run over it; restore the file, or start again, "
                "which runs the reference over what changed"
            )
        found = [self.cache.get(key) for key in batch.keys]
        rows = [[logps[name] for name in batch.branches] for logps in found]
        return batch.summed_logps(torch.tensor(rows, dtype=torch.float64, device=batch.input_ids.device))

    @property
    def scored_beside_policy(self) -> bool:
        """Whether the head is to score `rows` in the policy's own products."""
        return self.cache is None and self.shares_head

    @torch.no_grad()
    def token_logps(self, batch: PreferenceBatch, features: list[Tensor] | None, blank: EncodedImages | None = None) -> Tensor:
        """(R,) log-probabilities of a batch's response tokens.

        features: the policy's of this batch, used where they are the reference's too. blank: see `model_parts.features_of_blank`; the
        batch has no picture.
        """
        return self._called(lambda: head.token_logps(self.model, self._rows(batch, features, blank), batch))

    @torch.no_grad()
    def rows(self, batch: PreferenceBatch, features: list[Tensor] | None, blank: EncodedImages | None = None) -> Tensor:
        """(U, H) hidden states that predict response tokens, see `head.scored_rows`. Arguments as of `token_logps`."""
        return self._called(lambda: self._rows(batch, features, blank))

    @torch.no_grad()
    def response_logps(self, batch: PreferenceBatch, blank: EncodedImages | None = None) -> Tensor:
        """(n, b) log-probabilities of each record's responses, see `head.response_logps`."""
        return self._called(lambda: head.summed(self._scored(batch, blank), batch))

    def _scored(self, batch: PreferenceBatch, blank: EncodedImages | None) -> Tensor:
        return head.token_logps(self.model, self._rows(batch, None, blank), batch)

    def _called(self, compute: Callable[[], Tensor]) -> Tensor:
        with self.active():
            if self.wrapped is None or self.second is None:
                return compute()
            return through_root(self.wrapped, self.second, compute)

    def _rows(self, batch: PreferenceBatch, features: list[Tensor] | None, blank: EncodedImages | None) -> Tensor:
        with self.autocast():
            if features is None or not self.shares_features:
                if blank is None:
                    features = model_parts.image_features(self.model, batch)
                else:
                    features, _ = model_parts.features_of_blank(self.model, batch, blank)
            return head.scored_rows(model_parts.hidden_states(self.model, batch, features), batch)
