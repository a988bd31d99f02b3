"""Content that nobody reads is refused with its place, in every reader; what carries none is passed over."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from training_cases import config, tiny

from mmdpo_trainers.data.content import ImagePart, UnreadContent, read_parts
from mmdpo_trainers.data.conversation import TEMPLATE_COLUMNS
from mmdpo_trainers.data.images import open_image
from mmdpo_trainers.data.pair_records import check_record, prompt_text, record_images, with_images_from
from mmdpo_trainers.data.pairs import read_pairs
from mmdpo_trainers.data.records import read_prompts
from mmdpo_trainers.data.sources import Problem, SourceRecord, read_source
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.training.trainer import PreferenceTrainer

COLUMNS: dict[str, Any] = {
    "videos": ["a.mp4"],
    "video": "a.mp4",
    "video_path": "a.mp4",
    "audio": {"bytes": None, "path": "a.wav"},
    "audios": ["a.wav"],
    "rejected_videos": ["b.mp4"],
    "images2": ["b.png"],
    "image_1": "b.png",
    "chosen_images": ["b.png"],
    "tools": '[{"type": "function"}]',
    "documents": [{"title": "a", "text": "b"}],
    "chat_template_kwargs": {"enable_thinking": False},
    "system": "Be kind.",
    "history": [["what ?", "this"]],
}
EMPTY: dict[str, Any] = {
    "videos": [],
    "video": None,
    "audio": {"bytes": None, "path": None},
    "tools": "[]",
    "chat_template_kwargs": {"enable_thinking": None},
    "system": "",
    "history": [],
    "images2": [""],
}
WITHOUT_CONTENT: dict[str, Any] = {
    "source": "web",
    "score": 0.5,
    "meta": {"a": [1]},
    "has_audio": False,
    "image_path": "coco/1.jpg",
    "num_videos": 0,
}
FIELDS: dict[str, Any] = {
    "tool_calls": [{"function": {"name": "f"}}],
    "tool_call_id": "1",
    "thinking": "hm",
    "reasoning_content": "hm",
    "images": ["b.png"],
    "videos": ["a.mp4"],
    "audio": {"id": "1"},
}
PARTS: list[tuple[dict[str, Any], str]] = [
    ({"type": "video", "video": "a.mp4"}, "is of type 'video'"),
    ({"type": "audio", "audio_url": "a.wav"}, "is of type 'audio'"),
    ({"type": "input_audio", "input_audio": {"data": ""}}, "is of type 'input_audio'"),
    ({"type": "tool_use", "name": "f"}, "is of type 'tool_use'"),
    ({"type": "thinking", "thinking": "hm"}, "is of type 'thinking'"),
    ({"video": "a.mp4"}, "is of type 'video'"),
    ({"type": "text", "text": "a", "image": "b.png"}, "['image'] is not read in a part of type text"),
    ({"type": "image", "image": "a.png", "max_pixels": 9}, "['max_pixels'] is not read in a part of type image"),
    ({"type": "image", "source": {"type": "base64", "data": "aa"}}, "['source'] is not read"),
    ({"type": "image", "image": "a.png", "url": "b.png"}, "gives its picture as image and as url"),
    (
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        "['image_url']: remote: https://example.org/a.png",
    ),
    ({"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}}, "['image_url']: not a picture"),
    ({"type": "image_url", "image_url": None}, "['image_url'] must be a data: URL or a file's path"),
    ({"type": "text", "text": None}, "['text'] must be text, got None"),
]


def pair(**changes: Any) -> dict[str, Any]:
    return {"id": "one", "images": ["a.png"], "prompt": "<image>\nwhat ?", "chosen": "red", "rejected": "blue", **changes}


def turn(role: str, content: Any, **fields: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content, **fields}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 6), (200, 30, 40)).save(tmp_path / "a.png")
    return tmp_path


def lines(folder: Path, *records: dict[str, Any]) -> Path:
    (folder / "mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "mine.jsonl"


def from_source(folder: Path, *records: dict[str, Any]) -> tuple[list[SourceRecord], list[Problem]]:
    items = list(read_source(lines(folder, *records), cache=folder / "cache"))
    return [i for i in items if isinstance(i, SourceRecord)], [i for i in items if isinstance(i, Problem)]


def conversation(**changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    return {"id": "one", "image": "a.png", "conversations": turns, **changes}


@pytest.mark.parametrize("column", COLUMNS)
def test_columns_with_content_are_refused_by_every_reader(folder: Path, column: str) -> None:
    value = {column: COLUMNS[column]}
    prompt = {"id": "one", "images": ["a.png"], "prompt": "<image>\nwhat ?"}
    for read, record in ((read_pairs, pair()), (lambda path: list(read_prompts(path)), prompt)):
        assert read(lines(folder, record))
        if column in TEMPLATE_COLUMNS:
            # The chat template gets them with the prompt; questions that are taken out of their conversation have none.
            assert read(lines(folder, {**record, **value}))[0][column] == COLUMNS[column]
            continue
        with pytest.raises(DataError, match=f"one.*column '{column}' is not read, and holds .*; .*") as caught:
            read(lines(folder, {**record, **value}))
        assert "leave the record out" in str(caught.value) or "put it there" in str(caught.value)
    records, problems = from_source(folder, conversation(**value), conversation(id="two"))
    if column == "system":
        assert len(records) == 2
        assert [(p.id, p.reason, p.dropped) for p in problems] == [("one", "system_prompt", False)]
    else:
        assert [r.id for r in records] == ["two"]
        assert [(p.id, p.reason, p.dropped) for p in problems] == [("one", "unread_content", True)]
        assert f"column '{column}' is not read" in problems[0].detail


@pytest.mark.parametrize("more", [EMPTY, WITHOUT_CONTENT], ids=["empty", "without content"])
def test_what_holds_no_content_is_passed_over(folder: Path, more: dict[str, Any]) -> None:
    assert len(read_pairs(lines(folder, pair(**more)))) == 1
    assert len(list(read_prompts(lines(folder, {"id": "one", "images": ["a.png"], "prompt": "<image>\nwhat ?", **more})))) == 1
    records, problems = from_source(folder, conversation(**more))
    assert len(records) == 1 and problems == []


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("field", FIELDS)
def test_fields_of_messages_beside_the_content_are_refused(folder: Path, column: str, field: str) -> None:
    role = "user" if column == "prompt" else "assistant"
    text = "<image>\nwhat ?" if column == "prompt" else "red"
    record = pair(**{column: turn(role, text, **{field: FIELDS[field]})})
    if column != "prompt" and field in ("tool_calls", "thinking", "reasoning_content"):
        assert read_pairs(lines(folder, record))[0][column][0][field] == FIELDS[field]
        return
    with pytest.raises(DataError, match=rf"record one: {column}\[0\]\['{field}'\] is not read, and holds"):
        read_pairs(lines(folder, record))
    if column != "rejected":
        _, problems = from_source(folder, record)
        assert [(p.reason, p.id) for p in problems] == [("unread_content", "one")]
    messages = conversation()
    messages["conversations"][1][field] = FIELDS[field]
    _, problems = from_source(folder, messages)
    assert [p.reason for p in problems] == ["unread_content"] and f"conversations[1]['{field}']" in problems[0].detail
    assert len(read_pairs(lines(folder, pair(**{column: turn(role, text, **{field: None, "weight": 1})})))) == 1


@pytest.mark.parametrize(("part", "words"), PARTS)
def test_parts_that_are_not_read_are_refused_by_place(folder: Path, part: dict[str, Any], words: str) -> None:
    content = [{"type": "text", "text": "what ?"}, part]
    with pytest.raises(UnreadContent) as caught:
        read_parts(content, "prompt[0]['content']")
    assert str(caught.value).startswith("prompt[0]['content'][1]") and words in str(caught.value)
    record = pair(prompt=turn("user", content), images=[])
    with pytest.raises(DataError) as refused:
        read_pairs(lines(folder, record))
    assert str(refused.value) == f"record one: {caught.value}"
    _, problems = from_source(folder, record)
    assert [(p.reason, p.detail) for p in problems] == [("unread_content", str(caught.value))]
    with pytest.raises(DataError, match=r"record one: chosen\[0\]\['content'\]\[1\]"):
        check_record(pair(chosen=turn("assistant", content)))


def test_parts_that_are_read() -> None:
    own = Image.new("RGB", (2, 2))
    content = ["a", {"type": "text", "text": "b", "image": None}, {"type": "image"}, {"text": "c"}, {"image": own}]
    content += [{"type": "image", "base64": base64.b64encode(b"data").decode()}, {"type": "image", "bytes": b"x", "path": "y"}]
    content += [{"type": "image_url", "image_url": {"url": "file:///a.png", "detail": "high"}}]
    pictures = [None, own, b"data", b"x", "file:///a.png"]
    parts = read_parts(content, "here")
    assert [part for part in parts if isinstance(part, str)] == ["a", "b", "c"]
    assert [part.picture for part in parts if isinstance(part, ImagePart)] == pictures


def test_pictures_are_in_images_or_in_parts_and_nowhere_else() -> None:
    own = [{"type": "text", "text": "is "}, {"type": "image", "image": "b.png"}, {"type": "text", "text": " red ?"}]
    record = pair(prompt=turn("user", own), images=None, image_path="from/here.png")
    assert prompt_text(record) == "is <image> red ?" and record_images(record) == ["b.png"]
    with pytest.raises(DataError, match=r"record one: 1 pictures are in parts of the prompt, and 1 in images; leave one"):
        check_record(pair(prompt=turn("user", own)))
    with pytest.raises(DataError, match=r"record one: 1 of the prompt's 2 image parts hold their picture themselves"):
        check_record(pair(prompt=turn("user", [*own, {"type": "image"}]), images=[]))
    with pytest.raises(DataError, match="record one: it has `image` beside other pictures; leave one of them"):
        check_record(pair(image="b.png"))
    one = pair(image="b.png", images=[])
    assert record_images(one) == ["b.png"] and prompt_text(one) == "<image>\nwhat ?"
    assert with_images_from(one, "folder") == {**pair(), "images": ["folder/b.png"]}
    with pytest.raises(DataError, match="record one: picture https://example.org/a.png: remote"):
        with_images_from(pair(images=["https://example.org/a.png"]), "folder")
    for column in ("image_path", "image_url", "pictures"):
        with pytest.raises(DataError, match=f"record one: it has `{column}`, but pictures are read from `images`"):
            check_record(pair(images=[], prompt="what ?", **{column: "b.png"}))


def test_sources_read_pictures_of_parts(folder: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "blue").save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    def asked(id: str, part: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"id": id, "prompt": turn("user", [part, {"type": "text", "text": "What?"}]), "completion": "Blue.", **more}

    records, problems = from_source(
        folder,
        asked("url", {"type": "image_url", "image_url": {"url": url}}),
        asked("path", {"type": "image", "path": "a.png"}),
        asked("both", {"type": "image", "path": "a.png"}, images=["a.png"]),
        asked("out", {"type": "image", "path": "../a.png"}),
    )
    assert [(r.id, r.question) for r in records] == [("url", "What?"), ("path", "What?")]
    assert [open_image(r.picture).getpixel((0, 0)) for r in records] == [(0, 0, 255), (200, 30, 40)]
    assert [(p.id, p.reason) for p in problems] == [("both", "several_pictures"), ("out", "outside_image_folder")]
    records, problems = from_source(
        folder, conversation(id="two columns", images=["a.png"]), conversation(id="in text", image=url)
    )
    assert [(r.id, r.question) for r in records] == [("in text", "What?")]
    assert open_image(records[0].picture).getpixel((0, 0)) == (0, 0, 255)
    assert [(p.id, p.reason) for p in problems] == [("two columns", "several_pictures")]


@pytest.mark.parametrize("form", ["parquet", "folder"])
def test_datasets_are_refused_before_work_starts(folder: Path, form: str) -> None:
    import datasets

    def saved(*records: dict[str, Any]) -> Path:
        texts = {name: datasets.Value("string") for name in ("id", "prompt", "chosen", "rejected")}
        features = datasets.Features(
            texts | {"images": datasets.List(datasets.Image()), "videos": datasets.List(datasets.Video(decode=False))}
        )
        data = datasets.Dataset.from_list(list(records), features=features).cast_column("videos", datasets.List(datasets.Video()))
        path = folder / f"{len(list(folder.iterdir()))}.{form}"
        data.to_parquet(str(path)) if form == "parquet" else data.save_to_disk(str(path))
        return path

    picture, video = {"bytes": (folder / "a.png").read_bytes()}, {"bytes": b"video", "path": None}
    good, bad = pair(images=[picture], videos=[]), pair(id="two", images=[picture], videos=[video])
    assert len(read_pairs(saved(good, good))) == 2
    with pytest.raises(DataError, match="record two: column 'videos' is not read"):
        read_pairs(saved(good, bad))
    items = list(read_source(saved(good, bad), cache=folder / "cache"))
    assert [(i.id, i.reason) for i in items if isinstance(i, Problem)] == [("two", "unread_content")]


def test_the_trainer_refuses_records_when_it_is_made(folder: Path) -> None:
    import datasets

    good = pair(images=[str(folder / "a.png")])
    bad = {**good, "id": "two", "chosen": turn("assistant", "red", refusal="hm")}
    data = {"list": [good, bad], "dataset": datasets.Dataset.from_list([{**bad, "prompt": "<image>\nwhat ?"}])}
    for train_dataset in data.values():
        loaded = tiny(folder / "model", torch.float32)
        options = {"processing_class": loaded.processor, "train_dataset": train_dataset}
        with pytest.raises(DataError, match=r"record two: chosen\[0\]\['refusal'\] is not read, and holds hm"):
            PreferenceTrainer(loaded.model, config(folder / "out"), **options)
    # What is made while it is read has nothing to look into beforehand.
    trainer = PreferenceTrainer(
        tiny(folder / "model", torch.float32).model,
        config(folder / "out"),
        processing_class=loaded.processor,
        train_dataset=datasets.Dataset.from_list([good]).with_transform(lambda rows: {**rows, "videos": [["a.mp4"]]}),
    )
    with pytest.raises(DataError, match="record one: column 'videos' is not read"):
        trainer.train()
