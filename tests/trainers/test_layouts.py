"""Published layouts, each made here in its shape: the record that it becomes, for preference pairs and for prompts, compared whole."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.data.dataset_checks import equal_answers
from mmdpo_trainers.data.images import open_image
from mmdpo_trainers.data.layouts import LAYOUTS, LayoutReader, fitting
from mmdpo_trainers.data.pair_rows import LaidOutRows
from mmdpo_trainers.data.pairs import read_pairs
from mmdpo_trainers.data.sources import SourceRecord, read_source, read_texts
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.files.spool import Spool
from mmdpo_trainers.stages import augment, pairs
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder

Record = dict[str, Any]

ASKED, BETTER, WORSE = "What is it?", "A cat.", "A dog."
PAIR = {"prompt": ASKED, "chosen": BETTER, "rejected": WORSE, "images": ["a.png"]}
"""What most of them become."""
HUMAN, GPT, BAD = (
    {"from": who, "value": text} for who, text in (("human", f"<image>\n{ASKED}"), ("gpt", BETTER), ("gpt", WORSE))
)
USER = {"role": "user", "content": f"<image>\n{ASKED}"}
SAID, SAID_BADLY = ({"role": "assistant", "content": text} for text in (BETTER, WORSE))
IN_TURNS = {"prompt": [USER], "chosen": BETTER, "rejected": WORSE, "images": ["a.png"]}


def rated(response: str, *ratings: str) -> Record:
    aspects = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
    return {
        "response": response,
        "model": "m",
        "annotations": {aspect: {"Rating": rating, "Rationale": "so"} for aspect, rating in zip(aspects, ratings, strict=True)},
    }


COMPLETIONS = [
    rated("Hm.", "3", "5", "3"),
    rated(BETTER, "5", "5", "4"),
    rated("?", "N/A", "5", "5"),
    rated(WORSE, "1", "5", "2"),
]

PAIRS: dict[str, tuple[Record, Record]] = {
    "TRL": ({"images": ["a.png"], "prompt": ASKED, "chosen": BETTER, "rejected": WORSE}, PAIR),
    "TRL, messages": (
        {"images": ["a.png"], "prompt": [USER], "chosen": [SAID], "rejected": [SAID_BADLY]},
        {**IN_TURNS, "chosen": [SAID], "rejected": [SAID_BADLY]},
    ),
    "TRL, implicit": (
        {"images": ["a.png"], "chosen": [USER, SAID], "rejected": [USER, SAID_BADLY]},
        {**IN_TURNS, "chosen": [SAID], "rejected": [SAID_BADLY]},
    ),
    "TRL, turns of ShareGPT": (
        {"images": ["a.png"], "prompt": [HUMAN], "chosen": GPT, "rejected": [BAD]},
        {**IN_TURNS, "chosen": [SAID], "rejected": [SAID_BADLY]},
    ),
    "RLHF-V": (
        {
            **{
                "ds_name": "RLHF-V",
                "image": "a.png",
                "origin_dataset": "coco",
                "origin_split": "{}",
                "idx": 0,
                "image_path": "x/a.png",
            },
            "text": json.dumps({"question": ASKED, "chosen": BETTER, "rejected": WORSE}),
        },
        {**PAIR, "ds_name": "RLHF-V", "origin_dataset": "coco", "origin_split": "{}", "idx": 0, "image_path": "x/a.png"},
    ),
    "RLAIF-V": (
        {
            "ds_name": "R",
            "image": "a.png",
            "question": ASKED,
            "chosen": BETTER,
            "rejected": WORSE,
            "origin_dataset": "coco",
            "idx": "1",
        },
        {**PAIR, "ds_name": "R", "origin_dataset": "coco", "idx": "1"},
    ),
    "MMPR": ({"image": "a.png", "question": ASKED, "chosen": BETTER, "rejected": WORSE}, PAIR),
    "MMPR, several pictures": (
        {"image": ["a.png", "b.png"], "question": f"<image>\n<image>\n{ASKED}", "chosen": BETTER, "rejected": WORSE},
        {**PAIR, "prompt": f"<image>\n<image>\n{ASKED}", "images": ["a.png", "b.png"]},
    ),
    "VLFeedback": (
        {"id": "a", "prompt": ASKED, "models": ["m"] * 4, "completions": COMPLETIONS, "image": "a.png"},
        {**PAIR, "id": "a"},
    ),
    "VLFeedback, lists by column": (
        {
            **{"id": "a", "prompt": ASKED, "img_path": "a.png"},
            "completions": {name: [each[name] for each in COMPLETIONS] for name in ("annotations", "model", "response")},
        },
        {**PAIR, "id": "a"},
    ),
    "VLFeedback, its folder of pictures": (
        {"id": "c", "prompt": ASKED, "completions": COMPLETIONS},
        {**PAIR, "id": "c", "images": ["merged_images/c.jpg"]},
    ),
    "Silkie's pairs": ({"prompt": ASKED, "img_path": "a.png", "chosen": BETTER, "rejected": WORSE}, PAIR),
    "POVID": (
        {"id": "1", "image": "a.png", "conversations": [HUMAN, GPT], "rejected_conversations": [HUMAN, BAD]},
        {**IN_TURNS, "id": "1", "chosen": [SAID], "rejected": [SAID_BADLY]},
    ),
    "HA-DPO": (
        {"image_id": 7, "question": ASKED, "chosen": BETTER, "reject": WORSE, "answer": "no", "correct": False},
        {**PAIR, "images": ["7.jpg"], "correct": False},
    ),
    "ShareGPT": (
        {"images": ["a.png"], "conversations": [HUMAN], "chosen": GPT, "rejected": BAD, "system": "Be brief."},
        {
            **{"images": ["a.png"], "chosen": [SAID], "rejected": [SAID_BADLY]},
            "prompt": [{"role": "system", "content": "Be brief."}, USER],
        },
    ),
    "ms-swift": ({"images": ["a.png"], "messages": [USER, SAID], "rejected_response": WORSE}, {**IN_TURNS, "chosen": [SAID]}),
    "ms-swift, messages": (
        {"images": ["a.png"], "rejected_images": ["b.png"], "messages": [USER, SAID], "rejected_messages": [USER, SAID_BADLY]},
        {**IN_TURNS, "rejected_images": ["b.png"], "chosen": [SAID], "rejected": [SAID_BADLY]},
    ),
    "ms-swift, query": (
        {"images": ["a.png"], "query": ASKED, "response": BETTER, "rejected_response": WORSE, "history": [["Hi", "Hello"]]},
        {
            **PAIR,
            "prompt": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": ASKED},
            ],
        },
    ),
    "LLaMA-Factory": (
        {"images": ["a.png"], "instruction": ASKED, "input": "Be sure.", "chosen": BETTER, "rejected": WORSE, "system": ""},
        {**PAIR, "prompt": f"{ASKED}\nBe sure."},
    ),
    "LLaMA-Factory, messages": (
        {"images": ["a.png"], "messages": [USER], "chosen": SAID, "rejected": SAID_BADLY},
        {**IN_TURNS, "chosen": [SAID], "rejected": [SAID_BADLY]},
    ),
}
"""Name, form -> a record, and what it is as a preference pair."""

QUESTIONS: dict[str, Record] = {
    "TRL, completion": {"images": ["a.png"], "prompt": ASKED, "completion": BETTER},
    "TRL, conversation": {"images": ["a.png"], "messages": [USER, SAID]},
    "LLaVA": {"id": "1", "image": "a.png", "conversations": [HUMAN, GPT]},
    "LLaMA-Factory, alpaca": {"images": ["a.png"], "instruction": ASKED, "output": BETTER},
    "ms-swift, answers": {"images": ["a.png"], "query": ASKED, "response": BETTER},
    "VQA": {"image": "a.png", "question": ASKED, "answer": BETTER},
    "VQA, annotators": {"image": "a.png", "question": ASKED, "answers": [{"answer": each} for each in ("no", BETTER, BETTER)]},
    "prompts": {"images": ["a.png"], "prompt": f"<image>\n{ASKED}", "answer": BETTER},
}
"""Name, form -> a record of one answer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    (folder / "merged_images").mkdir()
    for name in ("a.png", "b.png", "7.jpg", "merged_images/c.jpg"):
        Image.new("RGB", (8, 6), (len(name), 3, 9)).save(folder / name)
    return folder


def write(folder: Path, records: list[Record], suffix: str = ".jsonl") -> Path:
    file = folder / f"data{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(records).to_parquet(file)
    else:
        file.write_text(json.dumps(records) if suffix == ".json" else "".join(json.dumps(record) + "\n" for record in records))
    return file


def placed(record: Record, folder: Path, id: str) -> Record:
    columns = {name: [str(folder / each) for each in record[name]] for name in ("images", "rejected_images") if name in record}
    return {"id": id, **record, **columns}


@pytest.mark.parametrize("case", PAIRS)
def test_preference_pairs(folder: Path, case: str) -> None:
    raw, expected = PAIRS[case]
    layouts = LayoutReader(pairs=True)
    assert read_pairs(write(folder, [raw]), layouts=layouts) == [placed(expected, folder, "line 1")]
    assert layouts.layout == case.partition(",")[0] and not layouts.left_out
    assert read_pairs(write(folder, [raw], ".json")) == [placed(expected, folder, "row 0")]


@pytest.mark.parametrize("case", [*PAIRS, *QUESTIONS])
def test_questions(folder: Path, case: str, tmp_path: Path) -> None:
    """`augment` takes the question, the better answer and the picture, and tells what a pair has in several."""
    raw = PAIRS[case][0] if case in PAIRS else QUESTIONS[case]
    layouts = LayoutReader(pairs=False)
    items = list(read_source(write(folder, [raw]), cache=tmp_path, layouts=layouts))
    assert layouts.layout == case.partition(",")[0]
    if case == "MMPR, several pictures":
        assert [item.reason for item in items if not isinstance(item, SourceRecord)] == ["several_pictures"]
        return
    record = items[-1]
    assert isinstance(record, SourceRecord)
    picture = {"HA-DPO": "7.jpg", "VLFeedback, its folder of pictures": "merged_images/c.jpg"}.get(case, "a.png")
    asked = {"LLaMA-Factory": f"{ASKED}\nBe sure."}.get(case, ASKED)
    if case == "ms-swift, query":
        assert (items[0].id, items[0].question) == ("row0-q0", "Hi")  # type: ignore[union-attr]
    assert (record.question, record.answer, record.picture) == (asked, BETTER, (folder / picture).resolve())


def test_every_row_of_the_table_has_a_case_and_a_source() -> None:
    """And no case fits two rows of different names."""
    records = [*(raw for raw, _ in PAIRS.values()), *QUESTIONS.values(), {"image": "a.png", "prompt": ASKED, "chosen": BETTER}]
    records.append({"image": "a.png", "chosen": [USER, SAID]})
    found = [{layout.convert: layout for layout in fitting(record, pairs=False)} for record in records]
    assert all(len({layout.name for layout in each.values()}) == 1 for each in found)
    used = {layout for record in records for layout in fitting(record, pairs=False)}
    assert used == set(LAYOUTS)
    assert all(layout.source.startswith("https://") or layout.name == "prompts" for layout in LAYOUTS)


@pytest.mark.parametrize("case", ["TRL", "RLHF-V", "MMPR", "VLFeedback, lists by column", "POVID"])
def test_datasets_with_pictures_inside(folder: Path, case: str, tmp_path: Path) -> None:
    raw, expected = PAIRS[case]
    data = (folder / "a.png").read_bytes()
    column = next(name for name in ("image", "images", "img_path") if name in raw)
    inside = {"bytes": data, "path": "a.png"}
    raw = {**raw, column: [inside] if column == "images" else inside}
    found = read_pairs(write(tmp_path, [raw], ".parquet"))
    assert isinstance(found, datasets.Dataset if case == "TRL" else LaidOutRows)
    pictures = {"images": [inside]}
    wanted = {**expected, "id": expected.get("id", "row 0"), **pictures}
    assert {name: value for name, value in found[0].items() if name in wanted and value is not None} == wanted
    assert open_image(found[0]["images"][0]).size == (8, 6)
    (source,) = read_source(tmp_path / "data.parquet", cache=tmp_path / "cache")
    assert isinstance(source, SourceRecord) and source.picture.read_bytes() == data


@pytest.mark.parametrize("form", ["base64", "a mapping", "a data: URL"])
def test_pictures_inside_texts(folder: Path, form: str, tmp_path: Path) -> None:
    """The reader of files opens them, under the limits that files have."""
    text = base64.b64encode((folder / "a.png").read_bytes()).decode()
    image = {"base64": text, "a mapping": {"bytes": text, "path": None}, "a data: URL": f"data:image/png;base64,{text}"}[form]
    file = write(tmp_path, [{"image": image, "question": ASKED, "chosen": BETTER, "rejected": WORSE}])
    ((picture,),) = [record["images"] for record in read_pairs(file)]
    assert open_image(picture).getpixel((0, 0)) == (5, 3, 9)
    (record,) = read_source(file, cache=tmp_path / "cache")
    assert isinstance(record, SourceRecord) and open_image(record.picture).size == (8, 6)
    with pytest.raises(DataError, match=r"record line 1: .*base64"):
        read_pairs(write(tmp_path, [{"image": {"bytes": "no!"}, "question": ASKED, "chosen": BETTER, "rejected": WORSE}]))


def test_ties_and_answers_without_ratings_are_counted(folder: Path, tmp_path: Path) -> None:
    tie = [rated(BETTER, "4", "4", "4"), rated(WORSE, "5", "4", "3")]
    lacking = [rated(BETTER, "4", "4", "4"), rated(WORSE, "N/A", "4", "3")]
    raws = [
        {"id": f"{number}", "prompt": ASKED, "image": "a.png", "completions": each} for number, each in enumerate((tie, lacking))
    ]
    layouts = LayoutReader(pairs=True)
    found = read_pairs(write(folder, [*raws, PAIRS["VLFeedback"][0]]), layouts=layouts)
    assert [record["id"] for record in found] == ["a"] and layouts.left_out == {"tie": 1, "unrated": 1}
    items = list(read_source(folder / "data.jsonl", cache=tmp_path))
    assert [(item.id, item.reason) for item in items if not isinstance(item, SourceRecord)] == [("0", "tie"), ("1", "unrated")]
    right = {**PAIRS["HA-DPO"][0], "correct": True}
    read_pairs(write(folder, [right, PAIRS["HA-DPO"][0]]), layouts=(layouts := LayoutReader(pairs=True)))
    assert layouts.left_out == {"correct": 1}


def test_columns_of_other_names(folder: Path, tmp_path: Path) -> None:
    raw = {"q": ASKED, "good": BETTER, "bad": WORSE, "pic": "a.png", "text": "not read", "n": 1}
    names = {"question": "q", "chosen": "good", "rejected": "bad", "images": "pic"}
    assert read_pairs(write(folder, [raw]), layouts=LayoutReader(names, pairs=True)) == [
        {**placed(PAIR, folder, "line 1"), "n": 1}
    ]
    layouts = LayoutReader({"question": "q", "answer": "good", "images": "pic"}, pairs=False)
    (record,) = read_source(write(folder, [raw]), cache=tmp_path, layouts=layouts)
    assert (
        isinstance(record, SourceRecord) and (record.question, record.answer) == (ASKED, BETTER) and layouts.layout == "columns"
    )
    with pytest.raises(
        DataError, match=r"record line 1: it has no column 'query', which `columns` names; its columns are q, good"
    ):
        read_pairs(folder / "data.jsonl", layouts=LayoutReader({**names, "question": "query"}, pairs=True))


def test_what_fits_two_layouts_is_refused_until_columns_say_which(folder: Path, tmp_path: Path) -> None:
    raw = {**PAIRS["MMPR"][0], **PAIRS["ShareGPT"][0]}
    del raw["image"], raw["system"]
    file = write(folder, [raw])
    words = r"its columns are those of MMPR \(question, chosen, rejected\) and ShareGPT \(.*say what they are with `columns`"
    with pytest.raises(DataError, match=f"record line 1: {words}"):
        read_pairs(file)
    (problem,) = read_source(file, cache=tmp_path)
    assert not isinstance(problem, SourceRecord) and problem.reason == "unread_content" and problem.id == "row0"
    assert read_pairs(file, layouts=LayoutReader({"question": "conversations"}, pairs=True)) == [
        {**placed(IN_TURNS, folder, "line 1"), "chosen": [SAID], "rejected": [SAID_BADLY]}
    ]


def test_a_file_of_two_layouts_is_refused(folder: Path, tmp_path: Path) -> None:
    file = write(folder, [PAIRS["MMPR"][0], PAIRS["TRL"][0], PAIRS["MMPR"][0]])
    with pytest.raises(
        DataError, match="record line 2: its columns are those of TRL, and of records before it those of MMPR; give each"
    ):
        read_pairs(file)
    items = list(read_source(file, cache=tmp_path))
    assert [isinstance(item, SourceRecord) for item in items] == [True, False, True]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"conversations": [{"from": "bot", "value": "?"}]},
            r"conversations\[0\] must have `from`, one of human, gpt.*correct it",
        ),
        ({"conversations": "What?"}, "conversations must be a list of messages"),
        ({"rejected": {"from": "gpt", "value": "a <image>"}}, "rejected has <image>, which stands for a picture"),
        ({"video": "a.mp4"}, "column 'video' is not read"),
        ({"conversations": [{**HUMAN, "images": ["a.png"]}]}, r"prompt\[1\]\['images'\] is not read"),
        ({"images": ["a.png", "b.png"]}, "1 <image> placeholders for 2 pictures"),
    ],
)
def test_what_is_not_read_is_refused_by_record_and_place(folder: Path, change: Record, words: str) -> None:
    with pytest.raises(DataError, match=f"record line 1: .*{words}"):
        read_pairs(write(folder, [{**PAIRS["ShareGPT"][0], **change}]))


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        ("RLHF-V", {"text": "{no"}, "text is no JSON of a question and two answers"),
        ("RLHF-V", {"text": '{"question": "a"}'}, "the JSON in text has no 'chosen', but question"),
        ("ms-swift", {"messages": [USER]}, "messages must end with the better answer"),
        (
            "ms-swift",
            {"rejected_response": None, "rejected_images": ["b.png"]},
            "neither rejected_response nor rejected_messages",
        ),
        ("ms-swift", {"rejected_messages": [USER, SAID_BADLY]}, "in rejected_response and in rejected_messages"),
        ("VLFeedback", {"completions": "?"}, "completions must be a list of answers"),
        ("ms-swift, query", {"history": ["Hi"]}, r"history\[0\] must be a question and its answer"),
    ],
)
def test_records_that_break_their_layout(folder: Path, case: str, change: Record, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_pairs(write(folder, [{**PAIRS[case][0], **change}]))


def test_questions_without_pictures(folder: Path) -> None:
    raw = {"instruction": "Name a colour.", "output": "Red."}
    (record,) = read_texts(write(folder, [raw, {**raw, "image": "a.png"}]))
    assert (record.id, record.question, record.answer) == ("row0", "Name a colour.", "Red.")  # type: ignore[union-attr]


def test_equal_answers_of_other_layouts(folder: Path, tmp_path: Path) -> None:
    raws = [PAIRS["MMPR"][0], {**PAIRS["MMPR"][0], "rejected": BETTER}]
    raws = [{**raw, "image": str(folder / "a.png")} for raw in raws]
    assert equal_answers(read_pairs(write(tmp_path, raws, ".parquet")), ["sigmoid"]) == ["row 1"]
    gone = [*raws, {**raws[0], "image": "gone.png"}]
    missing: list[str] = []
    assert len(read_pairs(write(tmp_path, gone, ".parquet"), missing)) == 2 and missing == ["row 2"]


def test_a_large_file_is_read_onto_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, expected = PAIRS["MMPR"]
    kept = read_pairs(write(folder, [raw] * 3))
    monkeypatch.setattr("mmdpo_trainers.data.pairs._IN_MEMORY", 10)
    monkeypatch.setattr("mmdpo_trainers.files.spool._IN_MEMORY", 10)
    found = read_pairs(folder / "data.jsonl")
    assert isinstance(found, Spool) and list(found) == kept and found[2] == placed(expected, folder, "line 3")


def test_stages_say_the_layout(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the console and in their summaries, with what was left out; `columns` come from the configuration."""
    tie = {**PAIRS["VLFeedback"][0], "id": "tie", "completions": [rated(BETTER, "4", "4", "4"), rated(WORSE, "4", "4", "4")]}
    file = write(folder, [PAIRS["VLFeedback"][0], tie])

    def run(stage: Any, name: str, **sections: Any) -> Record:
        config = RunConfig.from_dict({"method": "mdpo" if name == "pairs" else "mia_dpo", "run_dir": str(tmp_path), **sections})
        return stage.run(StageContext(run=RunFolder(tmp_path / name), config=config, stage=name))  # type: ignore[no-any-return]

    summary = run(pairs, "pairs", pairs={"source": str(file), "held_out": 0.0})
    assert summary["layout"] == "VLFeedback" and summary["lost"] == {"records": 1, "of": 2, "reasons": {"tie": 1}}
    single: Record = {"augment": {"formats": {"single": 1.0}}, "evaluate": {"source": str(file)}, "allow_missing": True}
    summary = run(augment, "augment", data={"source": str(file)}, **single)
    assert summary["layout"] == "VLFeedback" and summary["lost"]["reasons"] == {"tie": 1}
    named = {
        "source": str(write(folder, [{"q": ASKED, "a": BETTER, "image": "a.png"}])),
        "columns": {"question": "q", "answer": "a"},
    }
    assert run(augment, "augment", data=named, **single)["layout"] == "columns"
    said = capsys.readouterr().err
    for words in ("pairs: layout: VLFeedback; 1 pair\n", "augment: layout: VLFeedback; 1 prompt from 1 question\n"):
        assert words in said
