"""Which tokens of a batch's chosen sequences are the pictures', and which of the asked-about one: what `attention_target` is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmdpo_kernels import SequencePaths


@dataclass(frozen=True, kw_only=True)
class AttentionTargets:
    """The m records of a micro-batch that have a target: an asked-about picture among several, or a part of one."""

    records: list[int]
    """(m,) which of the batch's records they are."""
    tokens: Tensor
    """(m, L) int64, see `SequencePaths`: prompt and chosen response."""
    rows: Tensor
    """(m, R) int64, see `SequencePaths`: those that predict the response."""
    pictures: Tensor
    """(m, L) bool: tokens of the record's pictures."""
    target: Tensor
    """(m, L) bool: those of the asked-about picture or part."""

    @property
    def paths(self) -> SequencePaths:
        """The sequences, as `record_path_maps` takes them."""
        return SequencePaths(self.tokens, self.rows)


class TargetList:
    """The targets of a batch, put together record by record."""

    def __init__(self) -> None:
        self._records: list[int] = []
        self._tokens: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._pictures: list[Tensor] = []
        self._target: list[Tensor] = []

    def add(self, record: int, tokens: Tensor, prompt: int, segments: Tensor, target: int) -> None:
        """tokens: (P + R,) of its chosen sequence, as places in the flattened batch; prompt: P; segments: (P,), -1 = text."""
        pictures = torch.zeros(len(tokens), dtype=torch.bool)
        pictures[:prompt] = segments >= 0
        asked = torch.zeros_like(pictures)
        asked[:prompt] = segments == target
        if not asked.any() or torch.equal(asked, pictures):
            # There is nothing else to look at, or nothing to look at.
            return
        self._records.append(record)
        self._tokens.append(tokens)
        self._rows.append(torch.arange(prompt - 1, len(tokens) - 1))
        self._pictures.append(pictures)
        self._target.append(asked)

    def made(self) -> AttentionTargets | None:
        """None: no record has a target."""
        if not self._records:
            return None
        return AttentionTargets(
            records=self._records,
            tokens=_padded(self._tokens, -1),
            rows=_padded(self._rows, -1),
            pictures=_padded(self._pictures, False),
            target=_padded(self._target, False),
        )


def _padded(values: Sequence[Tensor], fill: int | bool) -> Tensor:
    return pad_sequence(list(values), batch_first=True, padding_value=fill)
