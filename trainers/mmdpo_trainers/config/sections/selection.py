"""Which answers become rejected answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import StrictFloat, StrictInt, StrictStr

from mmdpo_trainers.config.options import MATCH_WORDS, Match, option
from mmdpo_trainers.config.values import Settings


@dataclass(kw_only=True)
class SelectConfig(Settings):
    """Which answers become rejected answers."""

    input: StrictStr | None = option(None, "your own scores .jsonl in place of score/scores.jsonl", path=True)
    preset: Literal["paper", "official_code", "custom"] = option("paper", "threshold table; custom: `thresholds` alone")
    rule: Literal["attention", "random_wrong", "perplexity"] = option(
        "attention", "attention: MIA-DPO; the others are control arms with the attention arm's number of pairs per format"
    )
    match: Match | Literal["preset"] = option(
        "preset",
        "how an answer is compared with the truth: one that is right, or of which nobody can tell, is never rejected; preset: contains "
        f"(paper, custom), exact (official_code); {MATCH_WORDS}",
    )
    thresholds: dict[StrictStr, dict[StrictInt, StrictFloat]] = option(
        help="format -> number of pictures -> attention ratio to stay under; entries replace the preset's", factory=dict
    )
    min_perplexity: StrictFloat | None = option(1.1, "answers with a perplexity at or below this are dropped; None: no rule")
    max_truth_chars: StrictInt | None = option(
        512, "records with a true answer this long or longer are dropped; None: no rule", ge=1
    )
    max_length_ratio: StrictFloat | Literal["preset"] | None = option(
        "preset", "longer over shorter of truth and response, in characters; preset: 5 (paper, custom), no rule (official_code)"
    )
    min_edit_distance: StrictFloat | Literal["preset"] | None = option(
        "preset", "smallest edit distance as a share of the longer text; preset: 0.1 (paper, custom), no rule (official_code)"
    )
    max_pairs: StrictInt | None = option(None, "keep at most this many pairs, drawn with the run's seed; None: all", ge=1)
