"""Rated answers to records that are trained on: the rules, held to an independent transcription, and the stage."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.sections.ranking import RankConfig
from mmdpo_trainers.config.sections.rating import RateConfig
from mmdpo_trainers.data.pairs import read_pairs
from mmdpo_trainers.errors import ConfigError, DataError, StageError
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.methods.ranking import RULES, Ranking, asked_values, rank_answers, with_attributes
from mmdpo_trainers.stages import rank
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder

FIVE = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
CODE = {"helpfulness": 1.0, "correctness": 1.0, "coherence": 1.0}


def rated(id: str, answers: Mapping[str, Any] | list[tuple[str, Any]], **changes: Any) -> dict[str, Any]:
    """A rated record. answers: text -> its ratings on FIVE, or one number for all of them, or None."""
    items = list(answers.items() if isinstance(answers, Mapping) else answers)
    ratings = [None if r is None else dict(zip(FIVE, r if isinstance(r, list) else [r] * 5, strict=True)) for _, r in items]
    record = {
        "id": id, "source_id": id, "format": "single", "images": [], "prompt": "what colour is it ?", "answer": "red", "target": 0,
        "num_images": 1, "box": None, "region": None, "patch_grid": None, "options": None, "responses": [text for text, _ in items],
        "ratings": ratings,
    }  # fmt: skip
    return {**record, **changes}


def texts(pair: Mapping[str, Any]) -> tuple[str, str]:
    return tuple(pair[side][0]["content"][0]["text"] for side in ("chosen", "rejected"))  # type: ignore[return-value]


def ranked(records: list[dict[str, Any]], seed: int = 0, **options: Any) -> Ranking:
    return rank_answers(records, RankConfig(**options), attributes=FIVE, seed=seed)


def transcribed(record: Mapping[str, Any], weights: Mapping[str, float], gap: float, rejected: str) -> list[tuple[str, str]]:
    """The paper's rule, and with `weights` and "lowest" the released code's, in whole fifths so that nothing is rounded."""
    best, found = None, {}
    for text, rating in zip(record["responses"], record["ratings"], strict=True):
        if rating is None:
            continue
        units = (
            sum(5 * weights[name] * value for name, value in rating.items() if name in weights)
            if weights
            else sum(rating.values())
        )
        found[text] = round(units)
    best = next((text for text in found if found[text] == max(found.values())), None)
    lower = [text for text in found if best is not None and found[best] - found[text] >= 5 * gap]
    if rejected == "lowest":
        lower = [next(text for text in lower if found[text] == min(found[each] for each in lower))] if lower else []
    return [(str(best), text) for text in lower]


@pytest.mark.parametrize("weights", [{}, CODE, {"correctness": 1.0}])
@pytest.mark.parametrize("rejected", ["all", "lowest"])
@pytest.mark.parametrize("gap", [1.0, 2.0])
def test_pairs_are_those_of_an_independent_transcription(weights: dict[str, float], rejected: str, gap: float) -> None:
    """Means of five whole numbers, such as 3.8 and 1.8, whose difference is below 2 in floating point."""
    draw = random.Random(gap)
    records = []
    for number in range(300):
        answers: dict[str, Any] = {f"answer {k}": [draw.randint(0, 4) for _ in FIVE] for k in range(4)}
        if number % 7 == 0:
            answers["answer 2"] = None
        records.append(rated(f"r{number}", answers))
    ranking = ranked(records, weights=weights, rejected=rejected, min_gap=gap)
    found: dict[str, list[tuple[str, str]]] = {record["id"]: [] for record in records}
    for pair in ranking.pairs:
        found[pair["source"]].append(texts(pair))
    assert found == {record["id"]: transcribed(record, weights, gap, rejected) for record in records}
    assert {record["id"] for record in ranking.dropped} == {id for id, pairs in found.items() if not pairs}
    assert all(record["rule"] == "gap" for record in ranking.dropped) and ranking.counts["unrated"] == 43
    assert len({pair["id"] for pair in ranking.pairs}) == len(ranking.pairs) > 20


def test_a_gap_of_two_is_not_lost_to_a_rounding() -> None:
    assert 3.8 - 1.8 < 2
    ranking = ranked([rated("a", {"good": [4, 4, 4, 4, 3], "bad": [1, 2, 2, 2, 2]})])
    assert [texts(pair) for pair in ranking.pairs] == [("good", "bad")]
    assert ranking.pairs[0]["values"] == {"chosen": 3.8, "rejected": 1.8}


def test_ties_repeats_and_answers_without_a_rating() -> None:
    records = [
        rated("tie", {"first": 4, "second": 4, "low": 1}),
        # Rated 4 and 2 for the same words: 3.
        rated("repeat", [("twice", 4), ("twice ", 2), ("low", 1)]),
        rated("alike", [("same", 4), ("same", 0)]),
        rated("unrated", {"a": None, "b": None}),
        rated("empty", {"": 4, "b": 2}),
        rated("close", {"a": 4, "b": 3}),
        rated("bad", {"a": 2, "b": 0}),
    ]
    ranking = ranked(records, min_chosen=3.0)
    assert [(pair["id"], *texts(pair)) for pair in ranking.pairs] == [("tie", "first", "low"), ("repeat", "twice", "low")]
    assert ranking.pairs[1]["ratings"]["chosen"]["correctness"] == 3
    assert {record["id"]: record["rule"] for record in ranking.dropped} == {
        "alike": "one_answer", "unrated": "no_rating", "empty": "one_answer", "close": "gap", "bad": "low"
    }  # fmt: skip
    assert dict(ranking.counts) == {"answers": 16, "unrated": 2, "empty": 1, "repeats": 2, "ties": 1}


def test_the_best_answer_is_chosen_and_rejected() -> None:
    """So that training by `nll` alone has no second sequence to run."""
    records = [rated("a", {"x": 1, "y": 3, "z": 3}), rated("b", {"x": 4, "y": None}), rated("c", {"x": None})]
    ranking = ranked(records, make="best")
    assert [(pair["id"], *texts(pair)) for pair in ranking.pairs] == [("a", "y", "y"), ("b", "x", "x")]
    assert ranking.counts["ties"] == 1 and [record["rule"] for record in ranking.dropped] == ["no_rating"]
    assert [pair["id"] for pair in ranked(records, make="best", min_chosen=4.0).pairs] == ["b"]


def test_attributes_are_written_into_the_prompt() -> None:
    record = rated("a", {"x": [4, 3, 2, 1, 0], "y": 1})
    made = ranked([record], make="attributes").pairs
    assert [texts(pair) for pair in made] == [("x", "x"), ("y", "y")] and [pair["id"] for pair in made] == ["a", "a#2"]
    string = "helpfulness:4,correctness:3,coherence:2,complexity:1,verbosity:0"
    assert made[0]["prompt"][0]["content"] == [{"type": "text", "text": f"what colour is it ?\n{string}"}]
    options = RankConfig(
        make="attributes", attribute="{name} is {value:g}", template="[{attributes}] {prompt}", ask={"verbosity": 1.0}
    )
    asked = asked_values(options, RateConfig())
    assert with_attributes("why ?", {"helpfulness": asked["helpfulness"], "verbosity": asked["verbosity"]}, options) == (
        "[helpfulness is 4,verbosity is 1] why ?"
    )
    with pytest.raises(
        DataError, match="record a: rated on helpfulness, .* rate.attributes are correctness, by which evaluation asks"
    ):
        rank_answers([record], RankConfig(make="attributes"), attributes=["correctness"], seed=0)


def test_random_pairs_are_as_many_and_know_nothing_of_the_ratings() -> None:
    records = [rated(f"r{n}", {"best": 4, "good": 3, "bad": 1, "worst": 0}) for n in range(400)]
    real, drawn = ranked(records).pairs, ranked(records, make="random_pairs", seed=1).pairs
    assert [pair["source"] for pair in drawn] == [pair["source"] for pair in real] and len(real) == 800
    # What the page shows of a pair is how its answers were rated.
    assert all(pair["values"]["chosen"] == {"best": 4, "good": 3, "bad": 1, "worst": 0}[texts(pair)[0]] for pair in drawn)
    chosen = [texts(pair)[0] for pair in drawn]
    assert all(70 < chosen.count(text) / 2 < 130 for text in ("best", "good", "bad", "worst"))
    assert drawn == ranked(records, make="random_pairs", seed=1).pairs != ranked(records, make="random_pairs", seed=2).pairs


def test_some_are_drawn() -> None:
    records = [rated(f"r{n}", {"a": 4, "b": 1, "c": 0}) for n in range(10)]
    ranking = ranked(records, max_pairs=5)
    kept = {pair["source"] for pair in ranking.pairs}
    assert len(ranking.pairs) == 5
    assert [(record["id"], record["rule"]) for record in ranking.dropped] == [
        (record["id"], "not_drawn") for record in records if record["id"] not in kept
    ]


def test_a_weight_of_what_was_not_rated() -> None:
    with pytest.raises(
        DataError, match="record a: rank.weights: no rating of 'truth'; the record has helpfulness, .*; take the weight out"
    ):
        ranked([rated("a", {"x": 4})], weights={"truth": 1.0})
    uneven = rated("a", {"x": 4, "y": 1})
    del uneven["ratings"][1]["verbosity"]
    with pytest.raises(DataError, match="record a: its answers are rated on different attributes"):
        ranked([uneven])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "{prompt} {attribute}"}, r"rank.template: .* cannot be filled in with prompt, attributes \(KeyError"),
        ({"template": "{attributes}"}, "rank.template: expected {prompt} in it once"),
        ({"attribute": "{name}"}, "rank.attribute: expected {value} in it once"),
        ({"min_gap": 0.0}, "rank.min_gap: expected above 0"),
        ({"make": "pair"}, "rank.make must be one of .*; did you mean 'pairs'?"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict({"rank": options})


def context_of(folder: Path, records: list[dict[str, Any]], **options: Any) -> StageContext:
    source = folder / "ratings.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = RunConfig.from_dict({"rank": {"input": str(source), **options}})
    return StageContext(run=RunFolder(folder / "run"), config=config, stage="rank")


def text(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "format": "text", "num_images": 0, "target": None}


def test_the_stage_writes_what_training_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts without pictures; the summary counts what was made, and a second go leaves the same files."""
    records = [
        text(rated("a", {"x": 4, "y": 1, "z": 1})),
        text(rated("b", {"x": 4, "y": 3})),
        text(rated("c", {"x": 4, "y": None})),
    ]
    context = context_of(tmp_path, records)
    summary = rank.run(context)
    whole = {name: (context.folder / name).read_bytes() for name in ("pairs.jsonl", "dropped.jsonl")}
    pairs = read_pairs(context.folder / "pairs.jsonl")
    assert [(pair["id"], pair["images"], *texts(pair)) for pair in pairs] == [("a", [], "x", "y"), ("a#2", [], "x", "z")]
    assert summary == {
        "records": 3, "answers": 7, "unrated": 1, "empty": 0, "repeats": 0, "ties": 0, "pairs": {"text": 2}, "prompts": 1,
        "dropped": {"one_answer": 1, "gap": 1}, "make": "pairs", "mean_gap": 3.0, "mean_chosen": 4.0,
    }  # fmt: skip
    shown = capsys.readouterr()
    assert "prompts dropped by gap" in shown.err + shown.out
    (context.folder / "pairs.jsonl").unlink()
    assert rank.run(context) == summary
    assert {name: (context.folder / name).read_bytes() for name in whole} == whole


def test_nothing_left_is_an_error_with_remedies(tmp_path: Path) -> None:
    context = context_of(tmp_path, [text(rated("a", {"x": 4, "y": 3})), text(rated("b", [("x", 4), ("x", 4)]))])
    with pytest.raises(
        StageError, match=r"rank left nothing of 2 prompts.*\n +one_answer +1 .*num_answers.*\n +gap +1 .*min_gap"
    ):
        rank.run(context)
    assert [record["rule"] for record in read_jsonl(context.folder / "dropped.jsonl")] == ["gap", "one_answer"]
    assert set(rank._REMEDIES) == set(RULES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratings": None}, "record 'a': field 'ratings' is missing or not valid"),
        ({"ratings": [{"x": 1.0}]}, "record 'a': ratings must be one for each of its 2 responses, got 1"),
        ({"ratings": [None, {"x": "4"}]}, "record 'a': a rating must be a mapping of attributes to numbers, or null"),
        ({"ratings": [None, {}]}, "record 'a': a rating must be a mapping"),
        ({"responses": ["x", 3]}, "record 'a': responses must be a list of texts"),
    ],
)
def test_files_that_are_not_rated_answers(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        rank.run(context_of(tmp_path, [{**text(rated("a", {"x": 4, "y": 1})), **changes}]))
