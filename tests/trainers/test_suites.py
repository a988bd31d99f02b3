"""Published benchmarks: each file layout read, answers read as VLMEvalKit reads them, marks by hand-made truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from published_files import hub_picture, in_base64, write_lines, write_parquet, write_tsv

from mmdpo_trainers.data.sources import Problem
from mmdpo_trainers.errors import ConfigError, DataError
from mmdpo_trainers.suites import suite_named
from mmdpo_trainers.suites.found import found_option, found_yes_or_no
from mmdpo_trainers.suites.reading import read

RED, GREEN, BLUE = (Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue"))


def items(name: str, path: Path, tmp_path: Path, images: Path | None = None) -> tuple[list[dict[str, Any]], list[Problem]]:
    found = list(read(suite_named(name), path, images=images, cache=tmp_path / "cache"))
    return [item for item in found if isinstance(item, dict)], [item for item in found if isinstance(item, Problem)]


def colour_of(path: str) -> str:
    with Image.open(path) as image:
        pixel = image.convert("RGB").getpixel((4, 4))
    return ("red", "green", "blue")[max(range(3), key=lambda channel: pixel[channel])]


CHOICES = {"A": "a cat", "B": "a dog", "C": "blue"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. a dog", "B"),
        ("The best option is [C].", "C"),
        ("**B**", "B"),
        ("A cat", "A"),  # the article, which stands alone among the last four words
        ("A big furry animal lies here", None),  # too far from the end, and no option's text
        ("A friend of mine is a dog", "B"),  # so the text decides
        ("b", None),  # a small letter is none
        ("A and B", None),
        ("I cannot", None),
        ("Cannot determine the answer from this", "Z"),
        ("Z", "Z"),
        ("a cat or a dog", None),
        ("It is a DOG", "B"),
        ("bluebird", "C"),  # within a word
        ("The answer is **B**, for neither A nor C has ears of that kind", "B"),
        ("the answer is best told by somebody else", "B"),  # the beginning of "best"
        ("a dog, " * 20, None),  # longer than twice all options
        ("", None),
    ],
)
def test_options_are_found_as_vlmevalkit_finds_them(answer: str, letter: str | None) -> None:
    assert found_option(answer, CHOICES) == letter


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes.", "yes"),
        ("No, there is not.", "no"),
        ("yes,no", None),
        ("There is no dog", "no"),
        ("There is not", None),
        ("noon", None),
        ("(yes)", "yes"),
        ("Yes/No", None),
        ("I cannot tell", None),
        ("1,000 times no!", "no"),
    ],
)
def test_yes_and_no_are_found_as_vlmevalkit_finds_them(answer: str, said: str | None) -> None:
    assert found_yes_or_no(answer) == said


def test_a_tsv_of_vlmevalkit(tmp_path: Path) -> None:
    """A picture, several, those of another row before or after; options, a hint, categories; what cannot be asked is named."""
    rows = [
        {"index": 1, "question": "Which one?", "A": "cat", "B": "dog\nor wolf", "answer": "B", "image": 2, "category": "x"},
        {"index": 2, "question": "What is it?", "hint": "Look.", "A": "cat", "B": "None", "answer": "A", "image": in_base64(RED)},
        {"index": 3, "question": "Which?", "A": "1", "B": "2", "C": "3", "answer": "C", "image": in_base64(RED, GREEN)},
        {"index": 4, "question": "Which?", "A": "1", "B": "2", "answer": "D", "image": "2"},
        {"index": 5, "question": "Which?", "A": "1", "B": "2", "answer": "A", "image": ""},
        {"index": 6, "question": "Which?", "A": "1", "B": "2", "answer": "A", "image": "99"},
        {"index": 7, "question": "Which?", "A": "1", "B": "2", "answer": "A", "image": "A" * 80},
    ]
    records, problems = items("mmstar", write_tsv(tmp_path / "x.tsv", rows), tmp_path)
    found = {record["id"]: record for record in records}
    assert list(found) == ["2", "3", "1"]
    assert found["2"]["prompt"] == (
        "<image>\nHint: Look.\nQuestion: What is it?\nOptions:\nA. cat\nB. None\nPlease select the correct answer from the options above. \n"
    )
    assert found["1"]["images"] == found["2"]["images"] and colour_of(found["1"]["images"][0]) == "red"
    assert found["1"]["choices"] == {"A": "cat", "B": "dog\nor wolf"} and found["1"]["groups"] == {"category": ["x"]}
    assert [colour_of(path) for path in found["3"]["images"]] == ["red", "green"] and found["3"]["prompt"].count("<image>") == 2
    assert {problem.id: problem.reason for problem in problems} == {
        "x.tsv:4": "no_answer",
        "x.tsv:5": "no_picture",
        "6": "missing",
        "7": "not_a_picture",
    }


def test_circular_questions_are_of_one_unit(tmp_path: Path) -> None:
    row = {"question": "Which?", "answer": "A", "image": in_base64(RED)}
    rows = [{"index": 7, "A": "1", "B": "2", **row}, {"index": 1_000_007, "A": "2", "B": "1", **row}]
    records, _ = items("mmbench", write_tsv(tmp_path / "x.tsv", rows), tmp_path)
    assert [record["unit"] for record in records] == ["7", "7"]
    told = [{**each, "g_index": 7} for each in rows]
    assert [r["unit"] for r in items("blink", write_tsv(tmp_path / "y.tsv", told), tmp_path)[0]] == ["7", "7"]
    assert [r["unit"] for r in items("mmstar", write_tsv(tmp_path / "z.tsv", rows), tmp_path)[0]] == ["7", "1000007"]


def test_pictures_stand_in_the_places_that_mmmu_names(tmp_path: Path) -> None:
    row = {
        "index": 1,
        "question": "Is <image 2> in <image 1>?",
        "answer": "B",
        "image": in_base64(RED, GREEN),
        "A": "no",
        "B": "yes",
    }
    opened = {"index": 2, "question": "How many in <image 1>?", "answer": "12", "image": in_base64(BLUE), "split": "validation"}
    wrong = {**row, "index": 3, "question": "Is it <image 3>?"}
    records, problems = items("mmmu", write_tsv(tmp_path / "x.tsv", [row, opened, wrong]), tmp_path)
    assert [colour_of(path) for path in records[0]["images"]] == ["green", "red"]
    assert records[0]["prompt"].startswith("Question: Is <image> in <image>?\n")
    assert (records[1]["answer"], records[1]["choices"]) == ("A", {"A": "12", "B": "Other Answers"})
    assert "Options" not in records[1]["prompt"] and [problem.reason for problem in problems] == ["no_picture"]
    mark = suite_named("mmmu").mark
    assert mark is not None
    assert mark(records[1], "It is 12") == ("A", {"accuracy": 1.0}) and mark(records[1], "13") == (None, {"accuracy": 0.0})


def test_blink_of_the_hub(tmp_path: Path) -> None:
    row = {
        "sub_task": "Counting",
        "question": "How many?",
        "prompt": "How many?\n(A) one\n(B) two",
        "choices": ["one", "two"],
        "image_1": hub_picture(RED),
        "image_2": hub_picture(BLUE),
    }
    rows = [{"idx": "val_Counting_1", "answer": "(B)", **row}, {"idx": "test_Counting_1", "answer": "hidden", **row}]
    write_parquet(tmp_path / "Counting" / "val.parquet", rows)
    records, problems = items("blink", tmp_path / "Counting", tmp_path)
    (record,) = records
    assert [colour_of(path) for path in record["images"]] == ["red", "blue"] and record["answer"] == "B"
    assert record["groups"] == {"category": ["Counting"]} and record["prompt"] == "<image>\n<image>\nHow many?\n(A) one\n(B) two"
    assert [problem.reason for problem in problems] == ["hidden_answer"]


def test_pope_in_its_three_forms(tmp_path: Path) -> None:
    (tmp_path / "val2014").mkdir()
    RED.save(tmp_path / "val2014" / "1.jpg")
    lines = [
        {"question_id": 1, "image": "1.jpg", "text": "Is there a cat in the image?", "label": "yes"},
        {"question_id": 2, "image": "../1.jpg", "text": "Is there a dog in the image?", "label": "no"},
        {"question_id": 3, "image": "2.jpg", "text": "Is there a dog in the image?", "label": "no"},
        {"question_id": 4, "image": "1.jpg", "text": "Is there a dog in the image?", "label": "maybe"},
    ]
    (tmp_path / "pope").mkdir()
    write_lines(tmp_path / "pope" / "coco_pope_popular.json", lines)
    records, problems = items("pope", tmp_path / "pope", tmp_path, images=tmp_path / "val2014")
    assert [(r["id"], r["prompt"], r["groups"]) for r in records] == [
        ("coco_pope_popular/1", "<image>\nIs there a cat in the image?", {"split": ["popular"]})
    ]
    assert [problem.reason for problem in problems] == ["outside_image_folder", "missing", "no_answer"]
    row = {"index": 0, "question": "Is it?", "answer": "Yes", "image": in_base64(RED), "category": "adversarial,random"}
    (table,), _ = items("pope", write_tsv(tmp_path / "POPE.tsv", [row]), tmp_path)
    assert table["groups"] == {"split": ["adversarial", "random"]} and table["answer"] == "yes"
    hub = {"id": "5", "question": "Is it?", "answer": "no", "image": hub_picture(RED), "category": "popular"}
    (of_hub,), _ = items("pope", write_parquet(tmp_path / "hub" / "test.parquet", [hub]), tmp_path)
    assert of_hub["id"] == "5" and of_hub["groups"] == {"split": ["popular"]}


def test_what_is_no_benchmark_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no benchmark 'popee'; did you mean 'pope'"):
        suite_named("popee")
    assert suite_named("mmbench-cn").name == "mmbench"
    file = write_lines(tmp_path / "x.jsonl", [{"a": 1}])
    with pytest.raises(DataError, match=r"no file of POPE: expected the columns image, label, question_id, text .*got a"):
        items("pope", file, tmp_path)


def marks(name: str, record: dict[str, Any], response: str) -> tuple[str | None, float]:
    mark = suite_named(name).mark
    assert mark is not None
    said, found = mark(record, response)
    value = found["accuracy"]
    assert isinstance(value, float)
    return said, value


def test_mathvista(tmp_path: Path) -> None:
    """Options by letter or text; numbers and texts where the whole response is one."""
    common = {
        "question": "Hint: …\nQuestion: How many?",
        "image": in_base64(RED),
        "skills": "['statistical reasoning', 'x']",
        "task": "TQA",
    }
    rows = [
        {"index": 1, "question_type": "multi_choice", "answer_type": "text", "choices": "['3/11', '8/11']", "answer": "8/11"}
        | {"answer_option": "B", **common},
        {"index": 2, "question_type": "free_form", "answer_type": "integer", "answer": "12", **common},
        {"index": 3, "question_type": "free_form", "answer_type": "float", "answer": "1.20", **common},
        {"index": 4, "question_type": "free_form", "answer_type": "list", "answer": "[1, 2]", **common},
        {"index": 5, "question_type": "free_form", "answer_type": "integer", "answer": "twelve", **common},
    ]
    records, problems = items("mathvista", write_tsv(tmp_path / "x.tsv", rows), tmp_path)
    assert [problem.reason for problem in problems] == ["no_answer"]
    assert records[0]["groups"] == {"task": ["TQA"], "skill": ["statistical reasoning", "x"]}
    said = [(0, "(B) 8/11"), (0, "it is 3/11"), (1, " 12 "), (1, "There are 12"), (2, "1.2"), (2, "1.3"), (3, "[1, 2]"), (3, "")]
    assert [marks("mathvista", records[number], response) for number, response in said] == [
        ("B", 1.0),
        ("A", 0.0),
        ("12", 1.0),
        (None, 0.0),
        ("1.2", 1.0),
        ("1.3", 0.0),
        ("[1, 2]", 1.0),
        (None, 0.0),
    ]


def test_mantis_and_its_short_answers(tmp_path: Path) -> None:
    common = {"images": [hub_picture(RED), hub_picture(GREEN)], "category": "co-reference", "data_source": "x"}
    rows = [
        {
            "id": "1",
            "question_type": "multi-choice",
            "question": "Left <image>, then?",
            "options": ["(A) red", "green"],
            "answer": "B",
        },
        {"id": "2", "question_type": "short-answer", "question": "<image><image> How many?", "options": [], "answer": "Two"},
    ]
    records, problems = items("mantis", write_parquet(tmp_path / "x.parquet", [{**row, **common} for row in rows]), tmp_path)
    assert not problems
    assert records[0]["prompt"] == (
        "<image>Left <image>, then?\n (A) red\n (B) green\nAnswer with the option's letter from the given choices directly."
    )
    assert records[0]["choices"] == {"A": "red", "B": "green"} and records[1]["groups"]["kind"] == ["short-answer"]
    assert marks("mantis", records[0], "green") == ("B", 1.0)
    assert marks("mantis", records[1], "Both have one. Final Answer: two") == ("two", 1.0)
    assert marks("mantis", records[1], "Two of them") == ("Two of them", 0.0)


def test_nlvr2_in_its_own_files(tmp_path: Path) -> None:
    for number, image in enumerate((RED, BLUE)):
        image.save(tmp_path / f"test1-0-1-img{number}.png")
    lines = [
        {"sentence": "One is red.", "label": "True", "identifier": "test1-0-1-0", "left_url": "http://x/1.jpg"},
        {"sentence": "Both are red.", "label": "False", "identifier": "test1-0-1-1"},
        {"sentence": "None is.", "label": "False", "identifier": "test1-9-1-1"},
    ]
    records, problems = items("nlvr2", write_lines(tmp_path / "test1.json", lines), tmp_path)
    assert [colour_of(path) for path in records[0]["images"]] == ["red", "blue"] and records[0]["prompt"].count("<image>") == 2
    assert [marks("nlvr2", record, "True")[1] for record in records] == [1.0, 0.0]
    assert [problem.reason for problem in problems] == ["missing"]


def test_mvbench_shows_frames_and_decodes_no_video(tmp_path: Path) -> None:
    for number in range(17):
        (tmp_path / "video" / "clip").mkdir(parents=True, exist_ok=True)
        (RED if number < 8 else BLUE).save(tmp_path / "video" / "clip" / f"{number:03d}.png")
    (tmp_path / "video" / "other.mp4").write_bytes(b"a video")
    row = {"question": "What happens?", "candidates": ["nothing", "all"], "answer": "all"}
    lines = [
        {**row, "video": "clip.mp4"},
        {**row, "video": "other.mp4"},
        {**row, "video": "../clip"},
        {**row, "video": "clip", "answer": "x"},
    ]
    file = write_lines(tmp_path / "action_sequence.json", lines)
    records, problems = items("mvbench", file, tmp_path, images=tmp_path / "video")
    (record,) = records
    assert [Path(path).name for path in record["images"]] == [f"{number:03d}.png" for number in (1, 3, 5, 7, 9, 11, 13, 15)]
    assert record["answer"] == "B" and record["groups"] == {"category": ["action sequence"]}
    assert [problem.reason for problem in problems] == ["video", "outside_image_folder", "no_answer"]
    assert "videos are not decoded" in problems[0].detail
    tsv = {
        **row,
        "candidates": str(row["candidates"]),
        "video": "clip",
        "prefix": "video/",
        "task_type": "Action Sequence",
        "index": 0,
    }
    (of_tsv,), _ = items("mvbench", write_tsv(tmp_path / "MVBench.tsv", [tsv]), tmp_path)
    assert of_tsv["images"] == record["images"] and of_tsv["groups"] == {"category": ["Action Sequence"]}
