"""One generated answer, from its token ids and the probabilities of each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mmdpo_trainers.models.loaded import LoadedModel


def response_of(loaded: LoadedModel, ids: Sequence[int], max_logps: Sequence[float]) -> dict[str, Any]:
    """Returns `response` (text), `response_ids` (without the end token), `num_tokens` (their number), `ended` (the model wrote an end
    token) and `perplexity` = exp(-mean_t log max_v p_t(v)), over all generated tokens: the end token, which was generated as well,
    included (in MIA-DPO's code it is one of the steps).

    ids: generated tokens; those behind an end token are nobody's. max_logps: per step log max_v p_t(v), p from the unwarped logits.
    """
    end = next((index for index, token in enumerate(ids) if token in loaded.end_ids), None)
    response_ids = list(ids[:end])
    generated = len(ids) if end is None else end + 1
    mean = sum(max_logps[:generated]) / generated
    return {
        "response": loaded.tokenizer.decode(response_ids, skip_special_tokens=True).strip(),
        "response_ids": response_ids,
        "num_tokens": len(response_ids),
        "ended": end is not None,
        "perplexity": math.exp(-mean),
    }
