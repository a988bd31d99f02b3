"""Which answers become rejected answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import StrictFloat, StrictInt, StrictStr

from mmdpo_trainers.config.options import MATCH_WORDS, Match, option
from mmdpo_trainers.config.values import Settings
from mmdpo_trainers.errors import ConfigError


@dataclass(kw_only=True)
class SelectConfig(Settings):
    """Which answers become rejected answers."""

    input: StrictStr | None = option(None, "your own scores .jsonl in place of score/scores.jsonl", path=True)
    preset: Literal["paper", "official_code", "custom"] = option(
        "paper",
        "threshold table; custom: `thresholds` alone",
        when="where too few or too many answers stay under the thresholds: quantile takes them from your own scores",
    )
    rule: Literal["attention", "random_wrong", "perplexity", "judge"] = option(
        "attention",
        "attention: MIA-DPO; the others are control arms with the attention arm's number of pairs per format; judge: the answers that stage "
        "rate gives a low rating",
    )
    max_rating: StrictFloat = option(2.0, "`rule: judge` only: an answer is rejected where its rating is at most this")
    rating: StrictStr | None = option(
        None, "`rule: judge` only: the attribute whose rating counts, such as correctness; None: the mean over all"
    )
    match: Match | Literal["preset"] = option(
        "preset",
        "how an answer is compared with the truth: one that is right, or of which nobody can tell, is never rejected; preset: contains "
        f"(paper, custom), exact (official_code); {MATCH_WORDS}",
    )
    thresholds: dict[StrictStr, dict[StrictInt, StrictFloat]] = option(
        help="format -> number of pictures -> attention ratio to stay under; entries replace the preset's", factory=dict
    )
    quantile: StrictFloat | Literal["youden"] | None = option(
        None,
        "thresholds from the scores, in place of `preset` and `thresholds`: the ratio that this share (0 to 1) of the answers of a format and "
        "number of pictures stays under; youden: the one that parts right answers from wrong ones best",
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

    def __post_init__(self) -> None:
        if self.quantile is not None and self.thresholds:
            raise ConfigError(
                "select.quantile takes thresholds from the scores, select.thresholds gives them; leave one of the two out"
            )
        if isinstance(self.quantile, float) and not 0 < self.quantile <= 1:
            raise ConfigError(f"select.quantile: expected a share above 0 and at most 1, or youden, got {self.quantile}")
