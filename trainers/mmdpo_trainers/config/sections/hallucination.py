"""How the model makes wrong answers of true ones, with part of its pictures hidden."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import StrictBool, StrictFloat, StrictInt, StrictStr

from mmdpo_trainers.config.options import option
from mmdpo_trainers.config.values import Settings


@dataclass(kw_only=True)
class HallucinateConfig(Settings):
    """Rejected answers by bias-driven hallucination sampling (BDHS, arXiv 2407.02477), from true ones."""

    input: StrictStr | None = option(
        None, "your own .jsonl in place of pairs/pairs.jsonl: prompt records with an `answer`, or preference data", path=True
    )
    rejected: Literal["hallucinated", "given"] = option(
        "hallucinated", "given: for an arm beside, the data's own rejected answers of the records that the main arm trains on"
    )
    hide: StrictFloat = option(0.99, "probability of each image token to be hidden from the model; 0: none is", ge=0, le=1)
    max_similarity: StrictFloat = option(
        0.97, "an answer as similar to the truth as this, or more, is sampled again, with other splits and tokens hidden", ge=0
    )
    max_tries: StrictInt = option(5, "samplings of one answer; the last of several does not follow the truth, and is taken", ge=1)
    unresolved: Literal["keep", "drop"] = option(
        "keep", "what becomes of an answer that is as similar after the last try; one in the truth's own words is dropped always"
    )
    swap_yes_no: StrictFloat = option(
        0.5, "probability that a sentence's leading yes is made no before it is continued, and no yes", ge=0, le=1
    )
    embedding: StrictStr | None = option(
        None,
        "local folder of a sentence-embedding model, such as all-mpnet-base-v2, whose cosine is the similarity; None: the words in "
        "common, by rapidfuzz",
        path=True,
        when="a folder of all-mpnet-base-v2 is what the paper has",
    )
    batch_size: StrictInt = option(16, "records worked on, and sentences continued, together", ge=1)
    max_new_tokens: StrictInt = option(256, "longest continuation of a sentence, and longest whole answer, in tokens", ge=1)
    do_sample: StrictBool = option(True, "sample the continuations; False: greedy")
    temperature: StrictFloat = option(1.0, "sampling temperature", gt=0)
    top_p: StrictFloat = option(1.0, "nucleus sampling: smallest set of tokens with this probability", gt=0, le=1)
