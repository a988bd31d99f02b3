"""MMPR's columns (question, chosen, rejected, image) are read as TRL's, from lines and from datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_models import sample_pictures
from training_cases import config, tiny

from mmdpo_trainers.data.pair_records import prompt_text, record_images
from mmdpo_trainers.data.pairs import read_pairs
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.training.trainer import PreferenceTrainer

ROWS: list[dict[str, Any]] = [
    {"question": "what colour is the circle ?", "image": "0.png", "chosen": "red", "rejected": "blue"},
    {"question": "<image>\nand <image> : which ?", "image": ["0.png", "1.png"], "chosen": "star", "rejected": "yes"},
    {"question": "is there a star ?", "image": "", "chosen": "yes", "rejected": "two"},
]


def write(folder: Path) -> Path:
    for index, picture in enumerate(sample_pictures(2)):
        picture.resize((48, 48)).save(folder / f"{index}.png")
    (folder / "mmpr.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder / "mmpr.jsonl"


def test_lines(tmp_path: Path) -> None:
    found = read_pairs(write(tmp_path))
    assert [prompt_text(record) for record in found] == [
        "<image>\nwhat colour is the circle ?",
        "<image>\nand <image> : which ?",
        "is there a star ?",
    ]
    assert [[Path(image).name for image in record_images(record)] for record in found] == [["0.png"], ["0.png", "1.png"], []]
    assert all("question" not in record and "image" not in record for record in found)


def test_it_is_trained_on_as_the_same_records_with_trl_columns(tmp_path: Path) -> None:
    found = read_pairs(write(tmp_path))
    trl = [
        {"id": row["id"], "prompt": text, "images": record_images(row), "chosen": row["chosen"], "rejected": row["rejected"]}
        for row, text in zip(found, (prompt_text(row) for row in found), strict=True)
    ]
    loaded = tiny(tmp_path / "model")
    trainer = PreferenceTrainer(loaded.model, config(tmp_path / "out"), processing_class=loaded.processor, train_dataset=found)
    assert [trainer.data_collator.key(row) for row in found] == [trainer.data_collator.key(row) for row in trl]


@pytest.mark.parametrize("embedded", [False, True])
def test_a_saved_dataset(tmp_path: Path, embedded: bool) -> None:
    write(tmp_path)
    rows = [ROWS[0], {**ROWS[0], "chosen": "star"}]
    if embedded:
        rows = [{**row, "image": {"bytes": (tmp_path / row["image"]).read_bytes(), "path": None}} for row in rows]
    data = datasets.Dataset.from_list(rows)
    data = data.cast_column("image", datasets.Image()) if embedded else data
    data.save_to_disk(str(tmp_path / "saved"))
    if not embedded:
        (tmp_path / "saved" / "0.png").write_bytes((tmp_path / "0.png").read_bytes())
    found = read_pairs(tmp_path / "saved")
    assert prompt_text(found[1]) == "<image>\nwhat colour is the circle ?" and found[1]["chosen"] == "star"
    [image] = record_images(found[0])
    assert image["bytes"] if embedded else Path(image).is_file()


def test_a_record_of_neither_layout_is_refused_with_both(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"ask": "what ?", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(DataError, match="no column 'prompt'; .* one of the layouts that docs/your_data.md lists, such as TRL's"):
        read_pairs(tmp_path / "bad.jsonl")
