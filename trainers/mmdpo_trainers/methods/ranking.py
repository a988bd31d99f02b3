"""Rated answers to records that are trained on: pairs, the best answer, answers behind their attributes. Pure functions.

Source: Li et al., "Multi-modal preference alignment remedies degradation of visual instruction tuning on language models" (arXiv
2402.10884) and its released code (findalexli/mllm-dpo); SteerLM (arXiv 2310.05344). The paper's rejected answers are at least 2 lower than the
best one. The code's value of an answer is the sum of helpfulness, correctness and coherence, `weights` of 1 each here, and of a prompt it takes
the lowest answer alone. Its attribute strings stand behind the question, as here.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmdpo_trainers.config.sections.ranking import RankConfig
from mmdpo_trainers.config.sections.rating import RateConfig
from mmdpo_trainers.data.conversation import Stored, map_question
from mmdpo_trainers.data.seeds import batch_seed
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.methods.selection import preference_pair

Record = dict[str, Any]

RULES = ("no_rating", "one_answer", "low", "gap", "not_drawn")
"""Why nothing was made of a prompt, or a record of it not kept, in the order they are looked at.

no_rating: no answer has text and ratings. one_answer: pairs need two different ones. low: the best value is under `min_chosen`.
gap: no answer is `min_gap` below the best. not_drawn: more than `max_pairs`.
"""


@dataclass(frozen=True)
class Answer:
    """A text that a prompt was answered with, and the mean of its ratings where it came several times."""

    text: str
    ratings: Mapping[str, float]
    value: float


@dataclass
class Ranking:
    """Records to train on, and what nothing was made of."""

    pairs: list[Record] = field(default_factory=list)
    """TRL's columns, with `ratings` of chosen and rejected and their `values`."""
    dropped: list[Record] = field(default_factory=list)
    """Rated records with `rule`."""
    counts: Counter[str] = field(default_factory=Counter)
    """answers: all there are; unrated, empty: those without ratings or text; repeats: those whose text another has; ties: prompts of which
    several different answers have the highest value, of which the first is taken."""


def answers_of(record: Mapping[str, Any], weights: Mapping[str, float], counts: Counter[str]) -> list[Answer]:
    """The different answers of a rated record that have text and ratings, in their order. counts: as of a `Ranking`, added to.

    Raises DataError, naming the record, for answers rated on different attributes, and for a weight of one that they are not rated on.
    """
    found: dict[str, list[Mapping[str, float]]] = {}
    for text, ratings in zip(record["responses"], record["ratings"], strict=True):
        counts["answers"] += 1
        counts["unrated"] += ratings is None
        counts["empty"] += ratings is not None and not text.strip()
        if ratings is not None and text.strip():
            found.setdefault(text.strip(), []).append(ratings)
    counts["repeats"] += sum(len(each) - 1 for each in found.values())
    answers = []
    rated = {tuple(sorted(ratings)) for each in found.values() for ratings in each}
    if len(rated) > 1:
        raise DataError(
            f"record {record['id']}: its answers are rated on different attributes: {sorted(rated)}; rate all on the same"
        )
    for text, each in found.items():
        mean = {name: statistics.fmean(ratings[name] for ratings in each) for name in each[0]}
        missing = [name for name in weights if name not in mean]
        if missing:
            raise DataError(
                f"record {record['id']}: rank.weights: no rating of {missing[0]!r}; the record has {', '.join(mean) or 'none'}; take the weight "
                "out, or rate that too (rate.attributes)"
            )
        value = sum(weight * mean[name] for name, weight in weights.items()) if weights else statistics.fmean(mean.values())
        # Ratings are few whole numbers, and a sum of their shares must not miss a gap of 2 by a rounding.
        answers.append(Answer(text, mean, round(value, 9)))
    return answers


def rank_answers(records: Sequence[Mapping[str, Any]], options: RankConfig, *, attributes: Sequence[str], seed: int) -> Ranking:
    """What `options.make` makes of rated records (`responses`, `ratings`: attribute -> value each, or None).

    A record that is trained on by its chosen answer alone has it as rejected too: a token tree holds the two once.
    attributes: in the order in which prompts name them, where `make` is attributes. Raises DataError, naming the record, for others.
    """
    ranking = Ranking()
    for record in records:
        answers = answers_of(record, options.weights, ranking.counts)
        values = [answer.value for answer in answers]
        if options.make == "random_pairs":
            values = random.Random(batch_seed(seed, "random_pairs", record["id"])).sample(values, len(values))
        rule, made = _made(record, answers, values, options, attributes)
        if rule is not None:
            ranking.dropped.append({**record, "rule": rule})
            continue
        ranking.counts["ties"] += options.make != "attributes" and values.count(max(values)) > 1
        ranking.pairs += made
    if options.max_pairs is not None and len(ranking.pairs) > options.max_pairs:
        _draw(ranking, records, options.max_pairs, seed)
    return ranking


def _made(
    record: Mapping[str, Any], answers: Sequence[Answer], values: Sequence[float], options: RankConfig, attributes: Sequence[str]
) -> tuple[str | None, list[Record]]:
    """The rule that a record fails, and else what is made of it. values: by which answers are ranked, one each."""
    paired = options.make in ("pairs", "random_pairs")
    if not answers:
        return "no_rating", []
    if options.make == "attributes":
        return None, [_steered(record, answer, number, options, attributes) for number, answer in enumerate(answers)]
    if paired and len(answers) < 2:
        return "one_answer", []
    highest = max(values)
    best = answers[values.index(highest)]
    if options.min_chosen is not None and highest < options.min_chosen:
        return "low", []
    if not paired:
        return None, [_pair(record, best, best, 0)]
    lower = [index for index, value in enumerate(values) if round(highest - value, 9) >= options.min_gap]
    if not lower:
        return "gap", []
    if options.rejected == "lowest":
        lower = [min(lower, key=values.__getitem__)]
    return None, [_pair(record, best, answers[index], number) for number, index in enumerate(lower)]


def _pair(record: Mapping[str, Any], chosen: Answer, rejected: Answer, number: int) -> Record:
    pair = preference_pair({**record, "answer": chosen.text, "rejected": rejected.text})
    sides = {"chosen": chosen, "rejected": rejected}
    return {
        **pair,
        "id": record["id"] if number == 0 else f"{record['id']}#{number + 1}",
        "source": record["id"],
        "ratings": {side: dict(answer.ratings) for side, answer in sides.items()},
        "values": {side: answer.value for side, answer in sides.items()},
    }


def _steered(record: Mapping[str, Any], answer: Answer, number: int, options: RankConfig, attributes: Sequence[str]) -> Record:
    if set(answer.ratings) != set(attributes):
        raise DataError(
            f"record {record['id']}: rated on {', '.join(answer.ratings)}, and rate.attributes are {', '.join(attributes)}, by which evaluation "
            "asks; set these to what the answers are rated on"
        )
    prompt = with_attributes(record["prompt"], {name: answer.ratings[name] for name in attributes}, options)
    return _pair({**record, "prompt": prompt}, answer, answer, number)


def with_attributes(prompt: Stored, values: Mapping[str, float], options: RankConfig) -> Stored:
    """A prompt whose last question names values of attributes, in their order: SteerLM's way to ask for an answer."""
    written = ",".join(options.attribute.format(name=name, value=value) for name, value in values.items())
    return map_question(prompt, lambda text: options.template.format(prompt=text, attributes=written))


def asked_values(rank: RankConfig, rate: RateConfig) -> dict[str, float]:
    """Attribute -> the value that a model trained on attributes is asked for: `rank.ask`, else the highest that there is."""
    return {name: rank.ask.get(name, rate.highest) for name in rate.attributes}


def _draw(ranking: Ranking, records: Sequence[Mapping[str, Any]], count: int, seed: int) -> None:
    drawn = set(random.Random(batch_seed(seed, "max_pairs")).sample(range(len(ranking.pairs)), count))
    by_id = {record["id"]: record for record in records}
    left = [pair for index, pair in enumerate(ranking.pairs) if index not in drawn]
    ranking.pairs = [pair for index, pair in enumerate(ranking.pairs) if index in drawn]
    kept = {pair["source"] for pair in ranking.pairs}
    gone = dict.fromkeys(pair["source"] for pair in left if pair["source"] not in kept)
    ranking.dropped += [{**by_id[id], "rule": "not_drawn"} for id in gone]
