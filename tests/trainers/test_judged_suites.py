"""Benchmarks that a judge or annotations mark: their published files as records, and figures against truth made by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import judged_files
import pytest

from mmdpo_trainers.answers.raters.parsing import ReplyError
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.data.sources import Problem
from mmdpo_trainers.errors import ConfigError, DataError
from mmdpo_trainers.report.benchmarks import changes_of, figures_of
from mmdpo_trainers.stages.benchmarks import described
from mmdpo_trainers.suites import Suite, suite_named, suites
from mmdpo_trainers.suites.judging import Prompts, listed_objects
from mmdpo_trainers.suites.reading import layouts_of, read

JUDGED = [name for name, suite in suites().items() if suite.judging is not None]


def records_of(name: str, path: Path, tmp_path: Path) -> tuple[list[dict[str, Any]], list[Problem]]:
    suite = suite_named(name)
    layouts_of(suite, path)
    items = list(read(suite, path, images=None, cache=tmp_path / "cache"))
    common = suite.common(path) if suite.common else {}
    found = [{**item, "common": common} for item in items if not isinstance(item, Problem)]
    return found, [item for item in items if isinstance(item, Problem)]


def figures(name: str, answers: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    return {key: each["value"] for key, each in figures_of(answers, described(suite_named(name)))["figures"].items()}


def judged(suite: Suite, records: Sequence[dict[str, Any]], said: Sequence[Any]) -> list[dict[str, Any]]:
    """Answers with the marks of what a judge said of each. said: (answer, what was read off each reply)."""
    assert suite.judging is not None
    found = []
    for record, (answer, values) in zip(records, said, strict=True):
        read_off, marks = suite.judging.marked(record, answer, values)
        problems = [{"reason": "malformed"} for value in values if value is None]
        found.append({**record, **answer, "said": read_off, "marks": marks or None, "problems": problems})
    return found


def test_mmhal(tmp_path: Path) -> None:
    """By hand: 6 and 2 are 4 on average, and one of two makes something up; what is not judged counts nowhere."""
    records, problems = records_of("mmhal", judged_files.mmhal(tmp_path / "mmhal"), tmp_path)
    assert [record["groups"]["type"] for record in records] == [["attribute"], ["counting"]]
    assert [problem.reason for problem in problems] == ["missing"]
    suite = suite_named("mmhal")
    asked = Prompts(suite.judging, "x").texts(records[0], {"response": "A blue <image> one."})
    assert len(asked) == 1 and "In the picture: Ball, Tree" in asked[0] and "A blue [picture] one." in asked[0]
    assert "what colour ? 0" in asked[0] and "It is red." in asked[0] and "<image>" not in asked[0]
    answer = {"response": "x"}
    answers = judged(
        suite, [*records, {**records[0], "id": "2", "unit": "2"}], [(answer, [6.0]), (answer, [2.0]), (answer, [None])]
    )
    found = figures_of(answers, described(suite))
    assert found["questions"] == 2 and found["unjudged"] == {"malformed": 1}
    assert {name: each["value"] for name, each in found["figures"].items()} == {"score": 4, "hallucination_rate": 1 / 2}
    assert found["by"]["type"]["counting"]["score"]["value"] == 2
    assert suite.judging.parse('Because. {"rating": 3}') == 3
    for reply in ('{"rating": 2.5}', '{"rating": 7}', "6"):
        with pytest.raises(ReplyError):
            suite.judging.parse(reply)


def test_mm_vet(tmp_path: Path) -> None:
    records, problems = records_of("mm_vet", judged_files.mm_vet(tmp_path / "mm-vet"), tmp_path)
    suite = suite_named("mm_vet")
    assert not problems and [record["id"] for record in records] == ["v1_0", "v1_1"]
    (first,), (second,) = (Prompts(suite.judging, "x").texts(record, {"response": "x = -1"}) for record in records)
    assert "-1 <AND> -5" in first and "half correct" in first and "a ball <OR> a globe" in second
    answers = judged(suite, records, [({"response": "-1"}, [0.5]), ({"response": "ball"}, [1.0])])
    found = figures_of(answers, described(suite))
    assert found["figures"]["score"]["value"] == 0.75
    assert {name: each["score"]["value"] for name, each in found["by"]["capability"].items()} == {
        "math": 0.5,
        "ocr": 0.5,
        "rec": 1,
    }
    assert set(found["by"]["together"]) == {"math + ocr", "rec"}


def test_llava_bench(tmp_path: Path) -> None:
    """By hand: 6 and 3 beside 8 and 10: 50 % of the reference's scores."""
    records, problems = records_of("llava_bench", judged_files.llava_bench(tmp_path / "wild"), tmp_path)
    suite = suite_named("llava_bench")
    assert [problem.reason for problem in problems] == ["no_reference"]
    (text,) = Prompts(suite.judging, "x").texts(records[0], {"response": "A cat."})
    assert text.index("A red ball in the grass.") < text.index("Assistant 1:\nA ball 0.") < text.index("Assistant 2:\nA cat.")
    said = [({"response": "x"}, [{"first": 8.0, "second": 6.0}]), ({"response": "x"}, [{"first": 10.0, "second": 3.0}])]
    answers = judged(suite, records, said)
    assert figures("llava_bench", answers) == {"relative": 50, "own": 4.5, "reference": 9}
    found = figures_of(answers, described(suite))
    assert found["by"]["category"]["conv"]["relative"]["value"] == 75
    low, high = found["figures"]["relative"]["interval"]
    assert low < 50 < high


def test_mt_bench(tmp_path: Path) -> None:
    """The second turn is asked behind the model's own answer; each turn is judged with all before it; an unjudged one counts nowhere."""
    records, problems = records_of("mt_bench", judged_files.mt_bench(tmp_path / "mt"), tmp_path)
    suite = suite_named("mt_bench")
    assert [problem.reason for problem in problems] == ["no_reference"] and records[0]["format"] == "text"
    assert suite.further is not None
    assert suite.further(records[0], ["It <image> is."]) == [
        {"role": "user", "content": "what is 0 ?"},
        {"role": "assistant", "content": "It [picture] is."},
        {"role": "user", "content": "which is red ?"},
    ]
    assert suite.further(records[0], ["a", "b"]) is None
    answer = {"response": "b", "responses": ["a", "b"]}
    plain, (first, second) = (Prompts(suite.judging, "x").texts(record, answer) for record in records)
    assert "standard" not in plain[0] and "standard" in first and "None is red." not in first and "None is red." in second
    assert "Question 2:\nwhich is red ?" in second and "answer to question 2:\nb" in second and "Question:\nwhat is 1 ?" in first
    answers = judged(suite, records, [(answer, [8.0, 5.0]), (answer, [2.0, None])])
    assert figures("mt_bench", answers) == {"score": 5, "turn_1": 5, "turn_2": 5}
    assert figures_of(answers, described(suite))["unjudged"] == {"malformed": 1}


def test_alpaca_eval(tmp_path: Path) -> None:
    """By hand: one answer wins in both orders, one loses as A and ties as B: (1 + 1/4) / 2."""
    records, _ = records_of("alpaca_eval", judged_files.alpaca_eval(tmp_path), tmp_path)
    suite = suite_named("alpaca_eval")
    texts = Prompts(suite.judging, "x").texts(records[0], {"response": "Red!"})
    assert "Answer A:\nRed!\n\nAnswer B:\nBlue." in texts[0] and "Answer A:\nBlue.\n\nAnswer B:\nRed!" in texts[1]
    answers = judged(suite, records, [({"response": "Red!"}, ["A", "B"]), ({"response": "Red it is"}, ["B", "tie"])])
    assert figures("alpaca_eval", answers) == {"win_rate": 0.625, "kept": 0.5, "length": 6.5, "reference_length": 5}
    half = judged(suite, records[:1], [({"response": "Red!"}, ["A", None])])
    assert half[0]["marks"] is None and figures_of(half, described(suite))["unjudged"] == {"malformed": 1}


def test_chair(tmp_path: Path) -> None:
    """Pictures that are there are described. By hand: one of two answers names what is not there, one mention of three, two of three kinds."""
    records, problems = records_of("chair", judged_files.coco(tmp_path / "coco"), tmp_path)
    suite = suite_named("chair")
    assert not problems and [(record["id"], record["objects"]) for record in records] == [
        ("1", ["dog", "person"]),
        ("2", ["cat"]),
    ]
    assert suite.mark is not None and suite.note is not None
    responses = ["A dog with a frisbee.", "Two cats."]
    answers = [
        {**record, **dict(zip(("said", "marks"), suite.mark(record, response), strict=True))}
        for record, response in zip(records, responses, strict=True)
    ]
    assert figures("chair", answers) == pytest.approx({"chair_s": 1 / 2, "chair_i": 1 / 3, "recall": 2 / 3, "words": 3.5})
    assert answers[0]["said"] == "dog, frisbee (not there)"
    assert suite.note(records[0]["common"]) == "objects are told by COCO's 80 names and their plurals"


def test_chair_without_pictures_is_refused(tmp_path: Path) -> None:
    folder = judged_files.coco(tmp_path / "coco")
    shutil.rmtree(folder / "val2014")
    with pytest.raises(DataError, match="holds no picture of its annotations"):
        layouts_of(suite_named("chair"), folder)


def test_object_halbench_by_rule_and_by_a_judge(tmp_path: Path) -> None:
    """The judge lists objects, each counted once; of an answer of three words it is not asked."""
    folder = judged_files.object_halbench(tmp_path / "objhal")
    records, problems = records_of("object_halbench", folder, tmp_path)
    rule, judge = suite_named("object_halbench"), suite_named("object_halbench_judged")
    assert [problem.reason for problem in problems] == ["no_annotation"] and rule.mark is not None and judge.judging is not None
    long, short = {"response": "A puppy, and no cat at all."}, {"response": "A red dog."}
    _, marks = rule.mark(records[0], long["response"])
    assert marks["chair_i"] == [1, 2] and marks["chair_s"] == [1.0, 1.0]
    assert len(Prompts(judge.judging, "x").texts(records[0], long)) == 1
    assert Prompts(judge.judging, "x").texts(records[1], short) == []
    answers = judged(judge, records, [(long, [["a puppy", "puppies"]]), (short, [])])
    assert figures("object_halbench_judged", answers) == pytest.approx(
        {"chair_s": 0, "chair_i": 0, "recall": 1 / 3, "words": 5, "all_answers": 0}
    )
    assert listed_objects('So: {"objects": ["a", "b"]}') == ["a", "b"]
    for reply in ("a, b", '{"objects": "a"}', '{"objects": [1]}'):
        with pytest.raises(ReplyError, match='key "objects" is a list of texts'):
            listed_objects(reply)


def test_amber(tmp_path: Path) -> None:
    """By hand. Nouns: dog, ground (grass), light (safe), desk (imagined), then sky: 1 of 5 is not there, of true objects 3 of 3 are named, of
    imagined ones 1 of 1, one of two descriptions makes something up. Questions: no, no of no, yes: 1 of 2 right, of two noes one is so."""
    records, problems = records_of("amber", judged_files.amber(tmp_path / "AMBER"), tmp_path)
    suite = suite_named("amber")
    assert not problems and suite.mark is not None
    assert [record["groups"]["dimension"][0] for record in records] == ["descriptions", "descriptions", "existence", "state"]
    responses = ["A dog on the ground in the light, a desk.", "The sky.", "No, there is not.", "no"]
    answers = [
        {**record, **dict(zip(("said", "marks"), suite.mark(record, response), strict=True))}
        for record, response in zip(records, responses, strict=True)
    ]
    expected = {"chair": 1 / 5, "cover": 1, "hallucination_rate": 1 / 2, "cog": 1}
    expected |= {"accuracy": 1 / 2, "precision": 1 / 2, "recall": 1, "f1": 2 / 3}
    assert figures("amber", answers) == pytest.approx({**expected, "score": (1 - 1 / 5 + 2 / 3) / 2})
    found = figures_of(answers, described(suite))
    low, high = found["figures"]["score"]["interval"]
    assert low < found["figures"]["score"]["value"] < high and found["figures"]["score"]["count"] == 4
    assert "score" not in found["by"]["dimension"]["existence"]
    assert changes_of(answers, answers, described(suite))["figures"]["score"]["value"] == 0


def test_what_lacks_beside_the_questions_is_said(tmp_path: Path) -> None:
    cases: list[tuple[str, Callable[[Path], Path], str]] = [
        ("amber", judged_files.amber, "data/relation.json"),
        ("llava_bench", judged_files.llava_bench, "context.jsonl"),
        ("chair", judged_files.coco, "annotations/captions_val2014.json"),
        ("mm_vet", judged_files.mm_vet, "mm-vet.json"),
    ]
    for name, make, gone in cases:
        folder = make(tmp_path / name)
        (folder / gone).unlink()
        suite = suite_named(name)
        with pytest.raises(DataError, match="lacks"):
            layouts_of(suite, folder)
            assert suite.beside is not None
            suite.beside(folder)


@pytest.mark.parametrize("name", JUDGED)
def test_a_judges_prompts_are_filled_and_the_users_may_stand_in_their_place(name: str, tmp_path: Path) -> None:
    suite = suite_named(name)
    assert suite.judging is not None and suite.mark is None
    Prompts(suite.judging, "x").check()
    own = tmp_path / "own.txt.j2"
    for text, said in (
        ("Rate {{ this }}", "cannot be filled"),
        ("Rate it", "does not show the answer"),
        ("{% for %}", "not a jinja2"),
    ):
        own.write_text(text)
        with pytest.raises(ConfigError, match=f"where: .*{said}"):
            Prompts(suite.judging, "where", str(own)).check()


def test_paths_of_a_judge_hold_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"evaluate": {"judge": {"source": "model", "judge": "m", "templates": {"mmhal": "a.j2"}}}}
    judge = RunConfig.from_dict(given).with_absolute_paths().evaluate.judge
    assert (judge.judge, judge.templates, judge.replies) == (str(tmp_path / "m"), {"mmhal": str(tmp_path / "a.j2")}, None)
