"""Answers that the policy gives while it is trained, and what is made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import StrictFloat, StrictInt, StrictStr

from mmdpo_trainers.config.options import option
from mmdpo_trainers.config.values import Settings


@dataclass(kw_only=True)
class OnlineConfig(Settings):
    """Online and mixed DPO: answers sampled from the policy in training, rated as the section `rate` says."""

    alpha: StrictFloat | None = option(
        None,
        "probability with which a record is online in a step: its answers are sampled then; 1: every time, 0: never; None: the preset's",
        ge=0,
        le=1,
    )
    use: Literal["pair", "negative"] | None = option(
        None,
        "pair: the best sampled answer against the worst, in place of the record's pair; negative: the worst sampled answer, where it is "
        "rated below the record's chosen one, is an extra rejected answer of the record; None: the preset's",
    )
    samples: StrictInt = option(2, "answers sampled of each prompt", ge=1)
    temperature: StrictFloat = option(0.9, "temperature of sampling", gt=0)
    top_p: StrictFloat = option(1.0, "sampling: smallest probability mass kept", gt=0, le=1)
    max_new_tokens: StrictInt = option(64, "longest sampled answer, in tokens", ge=1)
    batch_size: StrictInt = option(8, "prompts answered together, each `samples` times", ge=1)
    attribute: StrictStr | None = option(None, "the rated attribute that ranks answers; None: the mean of all")
    min_gap: StrictFloat = option(0.0, "answers whose ratings differ by less are a tie; equal ratings always are", ge=0)
    missing_eos_penalty: StrictFloat | None = option(
        None, "taken off the rating of an answer that max_new_tokens cut, which in any case is never chosen", gt=0
    )
    without_pair: Literal["offline", "skip"] | None = option(
        None,
        "where sampling gives no pair (a tie, no rating): `offline` trains on the record's own pair, `skip` leaves the record out of the "
        "step, as it does records without a pair of their own; None: the preset's, or offline",
    )
