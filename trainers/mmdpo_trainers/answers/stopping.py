"""Generation that ends where the text of an answer says so, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

Finished = Callable[[int, list[int]], bool]
"""(record's index, its generated ids) -> whether the answer is complete."""


class TextEnd(StoppingCriteria):
    """Ends a row once `finished` says so. indices: the rows' records. width: columns of the prompts."""

    def __init__(self, finished: Finished, indices: Sequence[int], width: int) -> None:
        self.finished, self.indices, self.width = finished, indices, width
        self.lengths: list[int | None] = [None] * len(indices)
        """Per row the generated tokens at its end; None: it has not ended by its text."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for row, ids in enumerate(input_ids[:, self.width :].tolist()):
            if self.lengths[row] is None and self.finished(self.indices[row], ids):
                self.lengths[row] = len(ids)
        ended = [length is not None for length in self.lengths]
        return torch.tensor(ended, device=input_ids.device)
