"""One generated answer, from its token ids and the probabilities of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmdpo_trainers.config.sections.answers import GenerateConfig
from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.models.loaded import LoadedModel

FIELDS = ("response", "response_ids", "num_tokens", "ended", "perplexity")
"""What an answer is, see `response_of`."""


def check_num_answers(options: GenerateConfig) -> None:
    """Raise ConfigError where several answers to a prompt would all be the same."""
    if options.num_answers > 1 and not options.do_sample:
        raise ConfigError(
            f"generate.num_answers: {options.num_answers} greedy answers to a prompt would be one and the same; set generate.do_sample to "
            "true, and generate.temperature"
        )


def several_responses(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Answers to one prompt, each as `response_of` gives it, as one line: `responses` (their texts), and of each in a list `num_tokens`,
    `ended` and `perplexity`."""
    lists = {name: [answer[name] for answer in answers] for name in ("num_tokens", "ended", "perplexity")}
    return {"responses": [answer["response"] for answer in answers], **lists}


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
