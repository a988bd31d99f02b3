"""Which rated answers are trained on, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import StrictFloat, StrictInt, StrictStr

from mmdpo_trainers.config.options import option
from mmdpo_trainers.config.values import Finite, Settings
from mmdpo_trainers.errors import ConfigError


@dataclass(kw_only=True)
class RankConfig(Settings):
    """Rated answers to records that are trained on."""

    input: StrictStr | None = option(None, "your own rated answers .jsonl in place of rate/ratings.jsonl", path=True)
    make: Literal["pairs", "random_pairs", "best", "attributes"] = option(
        "pairs",
        "pairs: the best answer against those that are min_gap lower; random_pairs: a control, the same with each prompt's ratings dealt out "
        "anew; best: the best answer alone (rejection sampling); attributes: every answer behind a prompt that names its ratings (SteerLM)",
    )
    weights: Finite[dict[StrictStr, StrictFloat]] = option(
        help="attribute -> weight: an answer's value is the weighted sum, such as of one attribute; empty: the mean over all",
        factory=dict,
    )
    min_gap: StrictFloat = option(
        2.0,
        "pairs: a rejected answer's value is at least this much below the chosen one's",
        gt=0,
        when="lower where ratings lie close together and few pairs are left",
    )
    rejected: Literal["all", "lowest"] = option("all", "pairs: every answer that is min_gap lower, or the lowest of them")
    min_chosen: StrictFloat | None = option(
        None, "pairs, best: prompts whose best answer has a value below this are left out; None: none"
    )
    max_pairs: StrictInt | None = option(None, "keep at most this many records, drawn with the run's seed; None: all", ge=1)
    attribute: StrictStr = option("{name}:{value:.0f}", "attributes: how one is written; they are joined by commas")
    template: StrictStr = option("{prompt}\n{attributes}", "attributes: how prompt and attributes are put together")
    ask: Finite[dict[StrictStr, StrictFloat]] = option(
        help="attributes: attribute -> value that the trained model is asked for in evaluation; of others it is rate.highest",
        factory=dict,
    )

    def __post_init__(self) -> None:
        for name, text, values, needed in (
            ("attribute", self.attribute, {"name": "a", "value": 1.0}, ("{value",)),
            ("template", self.template, {"prompt": "a", "attributes": "b"}, ("{prompt}", "{attributes}")),
        ):
            try:
                text.format(**values)
            except (KeyError, IndexError, ValueError, AttributeError) as error:
                raise ConfigError(f"rank.{name}: {text!r} cannot be filled in with {', '.join(values)} ({error!r})") from None
            if missing := [each for each in needed if text.count(each) != 1]:
                raise ConfigError(f"rank.{name}: expected {missing[0].rstrip('}')}}} in it once, got {text!r}")
