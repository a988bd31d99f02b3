"""Answer matching, the selection rules and presets, the control arms, and the select stage."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mmdpo_trainers.config.run_config import RunConfig, SelectConfig
from mmdpo_trainers.data.match import answers_match, chosen_option, is_right, normalize_answer, say_option
from mmdpo_trainers.data.pairs import replay_pairs
from mmdpo_trainers.errors import ConfigError, DataError, StageError
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.methods.selected import Facts, Selection, rules_of
from mmdpo_trainers.methods.selection import SelectionRules, WrongAnswers, preference_pair, rejected_answer
from mmdpo_trainers.stages import select
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder


def scored(id: str = "a", **changes: Any) -> dict[str, Any]:
    record = {
        "id": id, "source_id": id, "format": "sequence", "images": ["/pictures/1.png", "/pictures/2.png"],
        "prompt": "Image1:<image>\nImage2:<image>\nIn Image2, what colour?", "answer": "red", "target": 1, "num_images": 2,
        "box": None, "region": None, "patch_grid": None, "options": None,
        "response": "blue", "response_ids": [5], "perplexity": 1.5, "ratio": 0.3, "ratio_mass": 0.3, "ratio_mean": 0.3,
    }  # fmt: skip
    return {**record, **changes}


def rules(**options: Any) -> SelectionRules:
    return SelectionRules.from_options(SelectConfig(**options))


def selected(records: list[dict[str, Any]], rules: SelectionRules) -> Selection:
    """MIA-DPO's selection, as stage select makes it."""
    return Facts.of(records, {"others": dataclasses.replace(rules, attention=False).failing}).by_attention(rules, "others")


def wrong_answers(records: list[dict[str, Any]], rules: SelectionRules) -> tuple[WrongAnswers, Selection]:
    truths: dict[str, list[str]] = {}
    for record in records:
        truths.setdefault(record["format"], []).append(record["answer"])
    wrong = WrongAnswers(truths, rules, 0)
    return wrong, Facts.of(records, {"wrong": wrong.failing}).by("wrong")


def drawn_pairs(records: list[dict[str, Any]], rules: SelectionRules) -> list[dict[str, Any]]:
    """The records of the random_wrong arm with their rejected answers."""
    wrong, selection = wrong_answers(records, rules)
    return [{**records[place], "rejected": wrong.rejected(records[place])} for place in selection.pairs]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The Red. ", "red"),
        ("Yes!", "yes"),
        ("3.5", "3.5"),
        ("a", "a"),
        (".5", ".5"),
        ("(.5).", ".5"),
        ("... five", "five"),
        ("T-shirt", "t-shirt"),
        ("Ｒ\n circle", "r circle"),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("response", "truth", "match", "expected"),
    [
        ("Red.", "red", "exact", True),
        ("It is red.", "red", "exact", False),
        ("It is red.", "red", "contains", True),
        ("It is reddish.", "red", "contains", False),
        ("", "red", "contains", False),
        (".5", "5", "exact", False),
        (".5.", "0.5", "exact", False),
        ("(.5)", ".5", "exact", True),
        ("red", "Red circle", "contains", False),
    ],
)
def test_short_answers(response: str, truth: str, match: str, expected: bool) -> None:
    assert answers_match(response, truth, match=match) == expected


@pytest.mark.parametrize(
    ("response", "truth", "expected"),
    [
        ("The picture shows a cat.", "a cat", True), ("It is not a cat.", "a cat", False), ("It isn't really a cat", "a cat", False),
        ("It is not a dog, it is a cat", "cat", True), ("not a dog but a cat", "cat", True), ("not only a cat", "cat", True),
        ("There is no doubt it is a cat.", "cat", True), ("a dog", "cat", False), ("It is not visible.", "Not visible", True),
        ("There are two dogs.", "2", True), ("2", "two", True), ("There are 12", "2", False), ("2.5 metres", "2", False),
        ("the red one", "1", False), ("There is one.", "1", True), ("-5", "5", False), ("twenty-two", "2", False),
        ("No, it is red.", "no", True), ("There is no dog.", "No", True), ("It isn't.", "no", True), ("It is a dog.", "Yes", None),
        ("It is red.", "no", None), ("Yes, there is no dog.", "no", False), ("No", "Yes", False), ("I would say yes.", "yes", True),
        ("on the mat", "The cat is on the mat.", None), ("red", "Red circle", None), ("", "cat", False), ("!", "cat", False),
    ],
)  # fmt: skip
def test_sentences_are_compared_by_what_they_say(response: str, truth: str, expected: bool | None) -> None:
    assert is_right(response, truth, match="contains") is expected
    assert answers_match(response, truth, match="contains") == (expected is True)
    assert is_right(response, truth) is (normalize_answer(response) == normalize_answer(truth))


@pytest.mark.parametrize(
    ("response", "expected"), [("It is blue.", True), ("blue", True), ("A", False), ("It is red.", False), ("red or blue", None)]
)
def test_sentences_about_options(response: str, expected: bool | None) -> None:
    for truth in ("B", "blue"):
        assert is_right(response, truth, options=["red", "blue"], match="contains") is expected


@pytest.mark.parametrize(("preset", "match"), [("paper", "contains"), ("custom", "contains"), ("official_code", "exact")])
def test_a_right_answer_in_a_sentence_is_not_rejected(preset: str, match: str) -> None:
    options = {"preset": preset, "thresholds": {"sequence": {2: 0.7}}, "max_length_ratio": None, "min_edit_distance": None}
    record = scored(answer="a cat", response="The picture shows a cat.")
    assert rules(**options).failing(record) == (["answer"] if match == "contains" else [])
    assert rules(**options, match="exact").failing(record) == []
    unclear = scored(answer="yes", response="It is a cat.")
    assert rules(**options).failing(unclear) == (["unclear"] if match == "contains" else [])


def test_wrong_answers_that_are_drawn_are_wrong_by_the_same_comparison() -> None:
    """Of "a cat", "a black cat" and "a dog", only the dog is wrong about a cat."""
    records = [scored(str(n), answer=answer) for n, answer in enumerate(["a cat", "a black cat", "a dog"] * 20)]
    drawn = drawn_pairs(records, rules())
    assert {(r["answer"], r["rejected"]) for r in drawn if "cat" in r["answer"]} == {("a cat", "a dog"), ("a black cat", "a dog")}
    exact = drawn_pairs(records, rules(match="exact"))
    assert ("a cat", "a black cat") in {(r["answer"], r["rejected"]) for r in exact}


@pytest.mark.parametrize(
    ("response", "mentioned", "expected"),
    [
        ("blue", False, 1), ("B", False, 1), ("(b)", False, 1), ("B. blue", False, 1), ("The answer is C", False, 2),
        ("Answer: (A).", False, 0), ("E", False, None), ("It is blue", False, None), ("It is blue", True, 1),
        ("blue or red", True, None), ("Because it glows", True, None), ("a dark blue one", True, 1),
    ],
)  # fmt: skip
def test_options_by_letter_or_text(response: str, mentioned: bool, expected: int | None) -> None:
    options = ["red", "blue", "green", "yellow"]
    assert chosen_option(response, options, mentioned=mentioned) == expected
    for truth in ("blue", "B"):
        match = "choice" if mentioned else "exact"
        assert answers_match(response, truth, options=options, match=match) == (expected == 1)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("The answer is a dog", 1), ("The answer is a cat.", 2), ("The answer is A.", 0), ("Option b", 1), ("choice: (c), I think", 2),
        ("The answer is a bird", None), ("My options.", None),
    ],
)  # fmt: skip
def test_an_article_is_not_a_letter(response: str, expected: int | None) -> None:
    assert chosen_option(response, ["red circle", "dog", "cat"], mentioned=True) == expected
    assert chosen_option("The answer is a dog", ["red circle", "dog", "cat"]) is None


@pytest.mark.parametrize(
    ("like", "expected"),
    [
        ("B", "C"), ("(b)", "(c)"), ("B.", "C."), ("B. blue", "C. green"), ("The answer is B.", "The answer is C."),
        ("blue", "green"), ("Blue.", "green"), ("something else", "green"),
    ],
)  # fmt: skip
def test_an_option_is_said_as_the_truth_is(like: str, expected: str) -> None:
    assert say_option(2, ["red", "blue", "green"], like) == expected


def test_a_drawn_wrong_answer_has_the_form_of_the_truth() -> None:
    options = ["red", "blue", "green", "grey"]
    records = [scored(str(number), answer="B", options=options) for number in range(40)]
    drawn = drawn_pairs(records, rules())
    assert {record["rejected"] for record in drawn} == {"A", "C", "D"} and len(drawn) == 40


# The numbers of METHODS: sequence paper 0.7/0.6/0.5/0.5 and code 0.8/0.7/0.6/0.6 (<=), collage and pic-in-pic (<).
SEQUENCE = {"paper": {2: 0.7, 3: 0.6, 4: 0.5, 5: 0.5}, "official_code": {2: 0.8, 3: 0.7, 4: 0.6, 5: 0.6}}
COLLAGE = {2: 0.7, 3: 0.6, 4: 0.5, 6: 0.4, 9: 0.3}


@pytest.mark.parametrize("preset", ["paper", "official_code"])
def test_thresholds_and_their_comparison(preset: str) -> None:
    def drops(format: str, num_images: int, ratio: float) -> bool:
        return "ratio" in rules(preset=preset).failing(scored(format=format, num_images=num_images, ratio=ratio))

    for count, threshold in SEQUENCE[preset].items():
        assert not drops("sequence", count, threshold - 1e-6) and drops("sequence", count, threshold + 1e-6)
        assert drops("sequence", count, threshold) == (preset == "paper")
    for count, threshold in COLLAGE.items():
        assert not drops("grid", count, threshold - 1e-6) and drops("grid", count, threshold)
    assert not drops("pip", 2, 0.8 - 1e-6) and drops("pip", 2, 0.8)


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ({}, {}, []),
        ({"ratio": 0.9}, {}, ["ratio"]),
        ({"ratio": 0.9, "response": "Red."}, {}, ["ratio", "answer", "edit_distance"]),
        ({"ratio": None}, {}, ["no_ratio"]),
        ({"format": "single", "num_images": 1}, {}, ["no_threshold"]),
        ({"num_images": 6}, {}, ["no_threshold"]),
        ({"num_images": 6}, {"thresholds": {"sequence": {6: 0.4}}}, []),
        ({"ratio": 0.35}, {"thresholds": {"sequence": {2: 0.3}}}, ["ratio"]),
        ({"ratio": 0.1}, {"preset": "custom"}, ["no_threshold"]),
        ({"response": " the RED. "}, {"min_edit_distance": None}, ["answer"]),
        ({"options": ["blue", "red"], "response": "B"}, {}, ["answer"]),
        ({"perplexity": 1.1}, {}, ["perplexity"]),
        ({"perplexity": 1.1000001}, {}, []),
        ({"perplexity": 1.0}, {"min_perplexity": None}, []),
        ({"answer": "x" * 511, "response": "y" * 511}, {}, []),
        ({"answer": "x" * 512, "response": "y" * 512}, {}, ["truth_length"]),
        ({"answer": "ab", "response": "cdefghijkl"}, {}, []),
        ({"answer": "ab", "response": "cdefghijklm"}, {}, ["length_ratio"]),
        ({"answer": "abcdefghijk", "response": "abcdefghijX"}, {}, ["edit_distance"]),
        ({"answer": "abcdefghij", "response": "abcdefghiX"}, {}, []),
        ({"answer": "abcdefghijk", "response": "abcdefghijX"}, {"preset": "official_code"}, []),
        ({"response": " "}, {}, ["empty_response"]),
        ({"answer": None}, {}, ["no_truth"]),
    ],
)
def test_rules(changes: dict[str, Any], options: dict[str, Any], expected: list[str]) -> None:
    assert rules(**options).failing(scored(**changes)) == expected


def test_tables_count_first_and_any() -> None:
    right = {"response": "red"}
    records = [scored("a"), scored("b", ratio=0.9), scored("c", ratio=0.9, **right), scored("d", perplexity=1.0, **right)]
    selection = selected(records, rules())
    assert [records[place]["id"] for place in selection.pairs] == ["a"]
    assert selection.dropped_by(first=True) == {"ratio": 2, "answer": 1}
    assert selection.dropped_by(first=False) == {"ratio": 2, "answer": 2, "perplexity": 1, "edit_distance": 2}
    assert rules_of(int(selection.failed[2])) == ["ratio", "answer", "edit_distance"]


def test_max_pairs_is_drawn_with_the_seed() -> None:
    records = [scored(str(index)) for index in range(50)]
    selection = selected(records, rules())
    drawn = [selection.draw(10, seed).pairs.tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 10
    assert drawn[0] == sorted(drawn[0])
    assert selection.draw(10, 0).dropped_by(first=True) == {"not_drawn": 40} and selection.draw(50, 0) is selection


def many() -> list[dict[str, Any]]:
    """Answers of which some are right and some attentive, in three formats."""
    kinds = [("sequence", 2), ("sequence", 4), ("grid", 4), ("pip", 2)]
    colours = ["red", "green", "blue"]
    return [
        scored(
            f"{index}",
            format=kinds[index % 4][0],
            num_images=kinds[index % 4][1],
            answer=colours[index % 3],
            response=colours[(index // 2) % 3],
            ratio=(index * 37 % 100) / 100,
        )
        for index in range(240)
    ]


@pytest.mark.parametrize("rule", ["perplexity", "random_wrong"])
def test_control_arms_have_the_attention_arms_mix(rule: str) -> None:
    records = many()
    attention = selected(records, rules())
    control = SelectionRules.from_options(SelectConfig(), attention=False)
    wrong, pool = wrong_answers(records, control)
    if rule == "perplexity":
        pool = Facts.of(records, {"control": control.failing}).by("control")
    assert len(pool.pairs) > len(attention.pairs)
    matched = pool.match_mix(attention.mix(), seed=0)
    assert matched.mix() == attention.mix() and sum(matched.dropped_by(first=True).values()) + len(matched.pairs) == 240
    assert set(matched.pairs) != set(attention.pairs)
    pairs = [records[place] for place in matched.pairs]
    assert max(record["ratio"] for record in pairs) > 0.8, "attention must play no part"
    rejected = wrong.rejected if rule == "random_wrong" else rejected_answer
    assert all(not answers_match(rejected(record), record["answer"]) for record in pairs)


def test_random_wrong_answers_come_from_other_records() -> None:
    control = SelectionRules.from_options(SelectConfig(), attention=False)
    drawn = Counter((record["answer"], record["rejected"]) for record in drawn_pairs(many(), control))
    assert set(drawn) == {(a, b) for a in ("red", "green", "blue") for b in ("red", "green", "blue") if a != b}
    assert min(drawn.values()) > 20
    assert drawn_pairs(many(), control) == drawn_pairs(many(), control)
    with_options = scored("o", options=["red", "pink"])
    assert drawn_pairs([with_options], control)[0]["rejected"] == "pink"
    assert wrong_answers([scored("a"), scored("b")], control)[1].dropped_by(first=True) == {"no_wrong_answer": 2}


def test_pairs_have_trls_columns() -> None:
    pair = preference_pair({**scored(), "rejected": "blue"})
    assert pair["prompt"] == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Image1:"},
                {"type": "image"},
                {"type": "text", "text": "\nImage2:"},
                {"type": "image"},
                {"type": "text", "text": "\nIn Image2, what colour?"},
            ],
        }
    ]
    assert pair["chosen"] == [{"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    assert pair["rejected"] == [{"role": "assistant", "content": [{"type": "text", "text": "blue"}]}]
    assert (pair["target"], pair["num_images"], pair["ratio"]) == (1, 2, 0.3)


def context_of(folder: Path, records: list[dict[str, Any]], **options: Any) -> StageContext:
    scores = folder / "run" / "score" / "scores.jsonl"
    scores.parent.mkdir(parents=True, exist_ok=True)
    moved = [{**record, "images": ["../images/1.png", "../images/2.png"]} for record in records]
    scores.write_text("".join(json.dumps(record) + "\n" for record in moved))
    return StageContext(run=RunFolder(folder / "run"), config=RunConfig.from_dict({"select": options}), stage="select")


def test_stage_writes_pairs_dropped_and_the_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    context = context_of(tmp_path, [scored("a"), scored("b", ratio=0.9), scored("c", response="red")])
    summary = select.run(context)
    assert summary["pairs"] == {"sequence": 1}
    assert summary["dropped"] == {"ratio": 1, "answer": 1} and summary["dropped_any"]["edit_distance"] == 1
    assert summary["thresholds"]["sequence"] == SEQUENCE["paper"] and summary["match"] == "contains"
    [pair] = read_jsonl(context.folder / "pairs.jsonl")
    assert pair["id"] == "a" and pair["images"] == ["../images/1.png", "../images/2.png"]
    assert [record["id"] for record in read_jsonl(context.folder / "dropped.jsonl")] == ["b", "c"]
    error = capfd.readouterr().err
    assert "dropped by ratio" in error and "answers compared by contains" in " ".join(error.split())


def test_nothing_selected_says_what_to_loosen(tmp_path: Path) -> None:
    context = context_of(tmp_path, [scored("a", ratio=0.9, perplexity=1.0)])
    with pytest.raises(StageError, match=r"(?s)no pair of 1 answers.*ratio .*select.thresholds.*perplexity .*min_perplexity"):
        select.run(context)
    assert [record["rules"] for record in read_jsonl(context.folder / "dropped.jsonl")] == [["ratio", "perplexity"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"thresholds": {"seqence": {2: 0.3}}},
            "select.thresholds: unknown format 'seqence'; expected sequence, grid, pip, single",
        ),
        ({"max_pairs": -1}, "select.max_pairs"),
        ({"min_edit_distance": float("nan")}, "select.min_edit_distance"),
    ],
)
def test_options_that_cannot_be_meant_are_errors(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select.run(context_of(tmp_path, [scored()], **options))


@pytest.mark.parametrize("field", ["response", "ratio", "perplexity"])
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    record = scored("odd")
    del record[field]
    with pytest.raises((DataError, StageError), match=rf"record 'odd'.*{field}"):
        select.run(context_of(tmp_path, [scored("a"), record]))


def test_the_perplexity_rule_can_be_left_out(tmp_path: Path) -> None:
    record = scored("a")
    del record["perplexity"]
    assert select.run(context_of(tmp_path, [record], min_perplexity=None))["pairs"] == {"sequence": 1}


def test_replayed_records_get_wrong_answers_by_the_same_comparison(tmp_path: Path) -> None:
    """Of "a cat", "a black cat" and "a dog", only the dog is wrong about a cat; compared exactly the black cat is too."""
    answers = ["a cat", "a black cat", "a dog"]
    singles = [
        {"id": str(n), "images": ["1.png"], "prompt": "<image>\nWhat is it?", "answer": answers[n % 3], "target": 0}
        for n in range(30)
    ]
    (tmp_path / "singles.jsonl").write_text("".join(json.dumps(record) + "\n" for record in singles))
    drawn = {match: replay_pairs(tmp_path / "singles.jsonl", 60, 0, match) for match in ("contains", "exact")}
    texts = {
        match: {(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs}
        for match, pairs in drawn.items()
    }
    assert ("a cat", "a black cat") in texts["exact"] - texts["contains"] and ("a cat", "a dog") in texts["contains"]
