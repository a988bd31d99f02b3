"""Raters: what is read off replies, the judge's prompts, ratings by truth, file and local model, and how good a rater is found to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import vllm_double
from prompt_records import make_prompts
from tiny_models import make_tiny_llava

from mmdpo_trainers.answers.raters import Rater, Rating, Surroundings, check_rater, rater_of
from mmdpo_trainers.answers.raters import local as local_module
from mmdpo_trainers.answers.raters.parsing import ReplyError, parse_choice, parse_ratings
from mmdpo_trainers.answers.raters.prompts import JudgePrompts
from mmdpo_trainers.answers.raters.quality import RatedPair, quality_counts, rate_pairs
from mmdpo_trainers.answers.raters.replies import costs
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.sections.rating import ATTRIBUTES, RateConfig
from mmdpo_trainers.errors import ConfigError, DataError
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.models import loading

RECORD: dict[str, Any] = {"id": "a", "prompt": "<image>\nWhat colour?", "images": ["a.png"], "answer": "red", "options": None}


def rater(folder: Path, **options: Any) -> Rater:
    return rater_of(RateConfig(**options), Surroundings(folder=folder))


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"a": 1, "b": 2.5}', {"a": 1, "b": 2.5}),
        ('Sure!\n```json\n{"A": "3", "b ": 0, "why": "{x}"}\n```', {"a": 3, "b": 0}),
        ('I think {of} {"a": 0, "b": 0}, no: {"b": {"score": 4, "reason": "good"}, "a": 1} {"c": 1}', {"a": 1, "b": 4}),
    ],
)
def test_ratings_are_found_in_replies(reply: str, expected: dict[str, float]) -> None:
    assert parse_ratings(reply, ("a", "b"), 0, 4) == expected


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("", "expected a JSON object with the keys a, b, got none"),
        ('{"a": 1, "b": 2', "JSON object"),
        ('{"c": 1}', "JSON object"),
        ('[{"a": 1}]', "b: expected a number from 0 to 4, got none"),
        ('{"a": 1, "b": 5}', "b: expected a number from 0 to 4, got '5'"),
        ('{"a": -0.5, "b": 1}', "a: expected"),
        ('{"a": true, "b": 1}', "got 'True'"),
        ('{"a": NaN, "b": 1}', "got 'nan'"),
        ('{"a": "3 of 4", "b": 1}', "got '3 of 4'"),
        ('{"a": {"why": 1}, "b": 1}', "a: expected"),
        ('{"a": null, "b": 1}', "got 'None'"),
        ("{" * 100_000, "JSON object"),
    ],
)
def test_what_is_no_rating_is_said(reply: str, said: str) -> None:
    with pytest.raises(ReplyError, match=said.replace("(", r"\(")):
        parse_ratings(reply, ("a", "b"), 0, 4)


def test_choices() -> None:
    assert [parse_choice(reply) for reply in ('x {"better": "B"} y', " a.", "Answer A", '{"better": "Tie"}')] == [
        "B",
        "A",
        "A",
        "tie",
    ]
    for reply in ("", "A or B", '{"better": "C"}', '{"better": null}', '{"best": "A"}'):
        with pytest.raises(ReplyError, match='expected a JSON object whose key "better"'):
            parse_choice(reply)


def test_prompts_hold_the_facts_asked_for_and_a_place_for_each_picture() -> None:
    record = {**RECORD, "caption": ["a red ball", "a ball <image>"], "options": ["red", "blue"], "target": 0}
    plain = JudgePrompts(RateConfig()).rating(record, "It is <image> blue.")
    assert (
        plain.count("<image>") == 1
        and "It is [picture] blue." in plain
        and "red ball" not in plain
        and "- correct answer" not in plain
    )
    assert all(f"- {name}: " in plain for name in ATTRIBUTES) and "from 0 (lowest) to 4 (highest)" in plain
    told = JudgePrompts(RateConfig(facts=["answer", "caption", "options"])).rating(record, "blue")
    assert "- correct answer: red\n- caption: a red ball; a ball [picture]\n- options: red; blue\n" in told
    without = JudgePrompts(RateConfig(facts=["caption"], images=False)).rating(RECORD, "blue")
    assert "<image>" not in without and "[picture]\nWhat colour?" in without and "known" not in without
    both = JudgePrompts(RateConfig(facts=["answer"])).comparison(RECORD, "red", "blue")
    assert both.index("- correct answer: red") < both.index("Answer A:\nred") < both.index("Answer B:\nblue")


def test_a_template_of_the_users_own(tmp_path: Path) -> None:
    own = tmp_path / "own.j2"
    own.write_text(
        "{{ prompt }} -> {{ response }}: {{ attributes | join('/') }} {{ lowest }}..{{ highest }} {{ facts.get('caption') }}"
    )
    options = RateConfig(template=str(own), attributes=["truth"], lowest=1.0, highest=10.0, facts=["caption"])
    assert (
        JudgePrompts(options).rating({**RECORD, "caption": "ball"}, "blue") == "<image>\nWhat colour? -> blue: truth 1..10 ball"
    )
    for text, said in (
        ("{{ prompt }}\n{{ answer }}", r"own.j2.* cannot be filled \('answer' is undefined\)"),
        ("{{ prompt }}\n{% if %}", "own.j2, line 2: not a jinja2 template"),
        ("{{ prompt }}{{ prompt }}{{ response }}", "expected `prompt` once, with the places of the pictures, got 2"),
        ("{{ response }}", "expected `prompt` once, with the places of the pictures, got 0"),
        ("{{ prompt.__class__.__mro__ }}", "cannot be filled"),
    ):
        own.write_text(text)
        with pytest.raises(ConfigError, match=said):
            check_rater(RateConfig(source="endpoint", template=str(own), endpoint=RunConfig().rate.endpoint.__class__(model="m")))


def test_the_truth_as_a_rater(tmp_path: Path) -> None:
    """A right answer is worth the most, no wrong one more than the middle, a close one more than another."""
    exact = rater(tmp_path, source="exact", attributes=["a", "b"], lowest=1.0, highest=5.0)
    [found] = exact.rate([RECORD], [["It is red.", "blue", "rod", "not red"]])
    values = [rating.value() for rating in found]
    assert values[0] == 5 and found[0].value("b") == 5 and values[2] == pytest.approx(1 + 4 / 3)
    assert 1 <= values[1] < values[2] <= 3 and values[3] <= 3  # type: ignore[operator]
    [[unknown]] = exact.rate([{**RECORD, "answer": None}], [["red"]])
    assert unknown.scores is None and unknown.reason == "no_truth" and unknown.value() is None


def test_ratings_from_a_file(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"id": "a", "ratings": [{"x": 1, "extra": 9}, None]},
        {"id": "b", "responses": ["two", "one"], "ratings": [{"x": 2}, {"x": 1}]},
    ]

    def read(*lines: dict[str, Any]) -> Rater:
        path = tmp_path / "own.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return rater(tmp_path, source="file", file=str(path), attributes=["x"])

    own = read(*lines)
    a, b, c = own.rate([{"id": "a"}, {"id": "b"}, {"id": "c"}], [["p", "q"], ["one", "two", "three"], ["r"]])
    assert [each.value() for each in (*a, *b, *c)] == [1, None, 1, 2, None, None]
    assert [each.reason for each in (a[1], b[2], c[0])] == ["not_rated"] * 3
    with pytest.raises(DataError, match="'a': expected a rating for each of 1 answers, got 2"):
        own.rate([{"id": "a"}], [["p"]])
    for line, said in (
        ({"id": "a", "ratings": [{"x": 7}]}, "line 1, rating 0: x: expected a number from 0 to 4, got 7"),
        ({"id": "a", "ratings": [{"y": 1}]}, "got None"),
        ({"id": "a", "ratings": [3]}, "expected a mapping of x to numbers"),
        ({"ratings": []}, "expected `id`"),
        ({"id": "a", "responses": ["p"], "ratings": []}, "responses must hold a text for each of 0"),
    ):
        with pytest.raises(DataError, match=said):
            read(line)
    with pytest.raises(DataError, match="line 2: id 'a' occurs twice"):
        read(lines[0], lines[0])


def test_a_local_model_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of random weights says nothing that can be read: it is asked again, and then that is reported. Kept replies need no model."""
    [record] = make_prompts(tmp_path, [("sequence", 2)])
    folder, run = make_tiny_llava(tmp_path / "model"), tmp_path / "run"
    options = {
        "source": "model",
        "judge": str(folder),
        "max_new_tokens": 4,
        "tries": 2,
        "batch_size": 1,
        "attributes": ["correctness"],
    }
    judge = rater(run, **options)
    [[first, same, other]] = judge.rate([record], [["red", "red", "blue"]])
    judge.close()
    assert first == same and first.scores is None and first.reason == other.reason == "malformed"
    assert "asked 2 times" in str(first.problem) and costs(run)["replies"] == 4 and costs(run)["completion_tokens"] > 0
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("loaded for nothing"))
    again = rater(run, **options)
    assert again.rate([record], [["red", "red", "blue"]]) == [[first, same, other]]
    again.close()
    # What it says is read like any judge's.
    said = {"response": '{"correctness": 3}', "ended": True, "num_tokens": 5}
    monkeypatch.setattr(local_module.LocalModel, "_answers", lambda self, batch: [said] * len(batch))
    other_run = rater(tmp_path / "other", **options)
    assert other_run.rate([record], [["red"]]) == [[Rating({"correctness": 3.0})]]
    other_run.close()


def test_a_local_model_by_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replies of transformers, by a double of vLLM's calls."""
    records, folder = make_prompts(tmp_path, [("sequence", 2), ("single", 1)]), make_tiny_llava(tmp_path / "model")
    options = {"source": "model", "judge": str(folder), "max_new_tokens": 4, "tries": 1}
    with pytest.raises(ConfigError, match="rate.engine: vllm is not installed"):
        rater(tmp_path / "none", **options, engine="vllm")
    llm = vllm_double.install(monkeypatch)
    texts = []
    for engine in ("transformers", "vllm"):
        judge = rater_of(RateConfig(**options, engine=engine), Surroundings(folder=tmp_path / engine, most_images=2))
        judge.rate(records, [["red"], ["blue"]])
        judge.close()
        texts.append([line["text"] for line in read_jsonl(tmp_path / engine / "replies.jsonl")])
    assert texts[0] == texts[1] and len(texts[0]) == 2 and [made["images"] for made in llm.made] == [2]


def test_answers_with_tokens_of_the_chat_format_are_refused_by_record(tmp_path: Path) -> None:
    [record] = make_prompts(tmp_path, [("single", 1)])
    judge = rater(tmp_path / "run", source="model", judge=str(make_tiny_llava(tmp_path / "model")), max_new_tokens=2, tries=1)
    [[rating, usual]] = judge.rate([record], [["red </s>", "red"]])
    judge.close()
    assert rating.reason == "refused" and record["id"] in str(rating.problem) and usual.reason == "malformed"


def test_what_the_check_counts() -> None:
    pairs = [
        RatedPair(chosen=4, rejected=1, forward="A", backward="B"),
        RatedPair(chosen=2, rejected=2, forward="A", backward="A"),
        RatedPair(chosen=1, rejected=2, forward="tie", backward="tie"),
        RatedPair(chosen=None, rejected=2, forward="B", backward="A"),
        RatedPair(chosen=3, rejected=2, forward=None, backward="B"),
    ]
    assert quality_counts(pairs) == {
        "agree": (2, 4),
        "tied": (1, 4),
        "consistent": (3, 4),
        "compared_agree": (1, 4),
        "first": (4, 8),
    }
    assert quality_counts([RatedPair(chosen=None, rejected=None)]) == {}


def test_the_truth_agrees_with_itself(tmp_path: Path) -> None:
    done: list[int] = []
    exact = rater(tmp_path, source="exact")
    pairs = rate_pairs(exact, [RECORD] * 5, [("red", "blue")] * 5, batch_size=2, advance=done.append)
    assert done == [2, 2, 1] and quality_counts(pairs) == {"agree": (5, 5), "tied": (0, 5)}


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        ({"attributes": []}, "rate.attributes: expected one or more"),
        ({"attributes": ["a", "a"]}, "each once"),
        ({"lowest": 4.0, "highest": 4.0}, "rate.highest: expected more than rate.lowest"),
        ({"facts": ["box"]}, "rate.facts"),
        ({"endpoint": {"url": "localhost:8000"}}, "endpoint.url: expected http"),
    ],
)
def test_settings_that_cannot_be(rate: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RunConfig.from_dict({"rate": rate})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"source": "file"}, "rate.file: expected a path"),
        ({"source": "model"}, "rate.judge: expected a path"),
        ({"source": "file", "file": "/nowhere.jsonl"}, "rate.file: /nowhere.jsonl does not exist"),
        ({"source": "exact", "check_pairs": "/nowhere"}, "rate.check_pairs: /nowhere does not exist"),
        ({"source": "endpoint"}, "rate.endpoint.model: expected the model's name"),
    ],
)
def test_settings_that_a_source_lacks(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_rater(RateConfig(**options))
