"""Perplexity of answers whose own log-probabilities nobody told: by a teacher-forced pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mmdpo_trainers.models.encode import encode_prompts, in_forwards
from mmdpo_trainers.models.loaded import LoadedModel


@torch.no_grad()
def answer_perplexities(loaded: LoadedModel, records: Sequence[Mapping[str, Any]]) -> list[float]:
    """exp(-mean_t log max_v p_t(v)) of each answer, over its `response_ids` and the end token where it `ended`: `response_of`'s `perplexity`.

    Equivalent, row by row: `model(...).logits[rows].log_softmax(-1).amax(-1).mean().neg().exp()`.
    """

    def work(indices: list[int]) -> list[float]:
        chosen = [records[index] for index in indices]
        encoded = encode_prompts(loaded, chosen, padding_side="right", answers=[record["response_ids"] for record in chosen])
        first = min(start for start, _ in encoded.response_spans) - 1
        width = encoded.inputs["input_ids"].shape[1]
        logits = loaded.model(**encoded.inputs, use_cache=False, logits_to_keep=width - first).logits
        found = []
        for row, record, (start, stop) in zip(logits, chosen, encoded.response_spans, strict=True):
            steps = row[start - 1 - first : stop - 1 - first + record["ended"]]
            steps = steps.float() if steps.dtype != torch.float64 else steps
            found.append(math.exp(-(steps.amax(-1) - steps.logsumexp(-1)).mean().item()))
        return found

    return in_forwards(loaded, records, work)
