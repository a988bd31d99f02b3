"""Preference data as others lay it out, and the mistakes that are usual in it: named with their record, or counted."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from training_cases import config, preference_records, tiny

from mmdpo_trainers.data.dataset_checks import equal_answers
from mmdpo_trainers.data.pair_records import record_images
from mmdpo_trainers.data.pairs import read_pairs
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.training.trainer import PreferenceTrainer

ANSWERS = {"chosen": "red", "rejected": "blue"}
TURNS = [{"from": "human", "value": "<image>What?"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    return tmp_path


def lines(folder: Path, *records: dict[str, Any]) -> Path:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "pairs.jsonl"


def data(*records: dict[str, Any]) -> Any:
    return datasets.Dataset.from_list([{"prompt": "What?", **ANSWERS, **record} for record in records])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": "a.png", "conversations": TURNS}, "line 1: no column 'prompt'; .* one of the layouts .* of answers alone"),
        (
            {"image": "a.png", "conversations": TURNS, "rejected_conversations": TURNS},
            "line 1: there is no prompt, and chosen and rejected",
        ),
        (
            {"chosen_text": "a", "rejected_text": "b", "ask": "c"},
            "such as TRL's .*; its columns are chosen_text, rejected_text, ask",
        ),
        (
            {"prompt": None, **{name: {"role": "assistant", "content": "a"} for name in ANSWERS}},
            "record line 1: there is no prompt",
        ),
        ({"prompt": "What?", "chosen": "red", "rejected": None}, "record line 1: rejected must be text .* or remove the record"),
    ],
)
def test_other_layouts_are_told_what_to_become(record: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_pairs(lines(folder, record))


@pytest.mark.parametrize("column", ["img", "photo", "image_file", "pic"])
@pytest.mark.parametrize("value", ["a.png", ["b/A.JPG"], {"bytes": b"x", "path": None}, "data:image/png;base64,AA=="])
def test_pictures_in_a_column_of_any_name_are_not_passed_over(column: str, value: Any) -> None:
    with pytest.raises(DataError, match=f"it has `{column}`, but pictures are read from `images`; rename it"):
        record_images({"id": "a.png", "prompt": "What?", **ANSWERS, column: value})


def test_what_is_no_picture_is_passed_over() -> None:
    record = {
        "id": "a.png",
        "prompt": "b.png",
        "chosen": "c.jpg",
        "rejected": "d.jpg",
        "note": "of a.png, say",
        "score": {"bytes": 1},
    }
    assert record_images(record) == []
    assert record_images({**record, "image": "a.png", "file_name": "a.png"}) == ["a.png"]


def test_a_folder_of_one_split(folder: Path) -> None:
    split = data({"images": [str(folder / "a.png")]})
    datasets.DatasetDict(train=split).save_to_disk(folder / "one")
    datasets.DatasetDict(train=split, test=split).save_to_disk(folder / "two")
    assert len(read_pairs(folder / "one")) == 1
    with pytest.raises(DataError, match=re.escape(f"(train, test); give the folder of one, such as {folder / 'two' / 'train'}")):
        read_pairs(folder / "two")


def test_a_folder_of_parquet_files(folder: Path) -> None:
    for number in range(2):
        data({"images": ["a.png"]}).to_parquet(folder / f"train-0000{number}-of-00002.parquet")
    found = read_pairs(folder)
    assert [row["id"] for row in found] == ["row 0", "row 1"] and found[1]["images"] == [str(folder / "a.png")]
    data({"images": ["a.png"]}).to_parquet(folder / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match=re.escape("several splits (test, train); give a folder with the files of one")):
        read_pairs(folder)


@pytest.mark.parametrize("kind", ["paths", "one path", "pictures"])
def test_missing_pictures_of_a_dataset_are_counted_before_training(kind: str, folder: Path) -> None:
    """Beside those that are there, are embedded, or that are none."""
    gone = folder / "gone.png"
    gone.write_bytes((folder / "a.png").read_bytes())
    inside = {"bytes": gone.read_bytes(), "path": "gone.png"}
    of = {
        "paths": [{"images": ["a.png"]}, {"images": []}, {"images": ["a.png", "gone.png"]}],
        "one path": [{"image": "a.png"}, {"image": None}, {"image": "gone.png"}],
        "pictures": [{"images": [inside]}, {"images": None}, {"images": [{"bytes": None, "path": str(gone)}]}],
    }[kind]
    made = data(*of)
    made = made.cast_column("images", datasets.List(datasets.Image())) if kind == "pictures" else made
    made.to_parquet(folder / "pairs.parquet")
    gone.unlink()
    with pytest.raises(DataError, match=r"record row 2: picture .*gone.png does not exist, and so it is with 1 of 3 records"):
        read_pairs(folder / "pairs.parquet")
    missing: list[str] = []
    found = read_pairs(folder / "pairs.parquet", missing)
    assert missing == ["row 2"] and [row["id"] for row in found] == ["row 0", "row 1"]


def test_equal_answers_are_counted(folder: Path) -> None:
    records = [{"rejected": "red "}, {}, {"rejected": ""}]
    listed = [{"prompt": "What?", **ANSWERS, **record} for record in records]
    assert equal_answers(read_pairs(lines(folder, *listed)), ["sigmoid"]) == ["line 1"]
    assert equal_answers(data(*records), ["nll", "copo", "sigmoid"]) == ["row 0"]
    said = [{"role": "assistant", "content": "red"}]
    assert equal_answers([{"id": 1, "chosen": said, "rejected": [dict(said[0])]}, {"id": 2, "prompt": "What?"}], ["hinge"]) == [
        "1"
    ]
    with pytest.raises(DataError, match="the same in all of 2 records, such as row 0"):
        equal_answers(data(*records[:1] * 2), ["sigmoid"])
    assert equal_answers(data(*records[:1] * 2), ["nll"]) == []


def test_the_trainer_says_equal_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = preference_records(2)
    records[1] = {**records[1], "rejected": records[1]["chosen"]}
    loaded = tiny(tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        PreferenceTrainer(loaded.model, config(tmp_path / "out"), processing_class=loaded.processor, train_dataset=records)
    assert "1 of 2 records has the same text as chosen and as rejected" in caplog.text
