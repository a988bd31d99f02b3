"""POPE (arXiv 2305.10355): is there such a thing in the picture? By split, which says how the things that are not there were drawn.

Read from its own files (`output/coco/coco_pope_random.json` of https://github.com/AoiDragon/POPE, an object a line: `question_id`, `image`,
`text`, `label`; the split is in the file's name), from VLMEvalKit's TSV and from the Hub's parquet (`question`, `answer`, `category`, `image`).
Answers are read as VLMEvalKit reads them; one that says neither yes nor no, or both, is wrong, and counts as no yes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdpo_trainers.suites.choice import base64_pictures
from mmdpo_trainers.suites.found import found_yes_or_no
from mmdpo_trainers.suites.reading import embedded, text_of
from mmdpo_trainers.suites.suite import BadRow, Figure, Layout, Marks, Question, Row, SameAs, Source, Suite

_SPLITS = ("random", "popular", "adversarial")


def _truth(row: Row, column: str) -> str:
    truth = text_of(row, column).strip().lower()
    if truth not in ("yes", "no"):
        raise BadRow("no_answer", f"column {column!r}: expected yes or no, got {truth[:60]!r}")
    return truth


def _of_its_file(row: Row, source: Source) -> Question:
    split = next((name for name in _SPLITS if name in source.file.stem), source.file.stem)
    return Question(
        id=f"{source.file.stem}/{text_of(row, 'question_id')}",
        text=text_of(row, "text"),
        pictures=[text_of(row, "image")],
        answer=_truth(row, "label"),
        groups={"split": [split]},
    )


def _of_a_table(row: Row, source: Source) -> Question:
    """Of the TSV a question may be of several splits, set apart by commas."""
    image, name = row.get("image"), row.get("index", row.get("id", row.get("question_id")))
    pictures: list[bytes | str] | SameAs
    if isinstance(image, str):
        pictures = base64_pictures(image)
    else:
        pictures = embedded([image])
        if not pictures:
            raise BadRow("no_picture", "column 'image' is empty")
    splits = [split.strip() for split in str(row.get("category", "")).split(",") if split.strip()]
    return Question(
        id=str(name if name is not None else source.number),
        text=text_of(row, "question"),
        pictures=pictures,
        answer=_truth(row, "answer"),
        groups={"split": splits} if splits else {},
    )


def mark_yes_or_no(record: Mapping[str, Any], response: str) -> tuple[str | None, Marks]:
    """Numerators and denominators, so that precision, recall and F1 follow from sums."""
    said, truth = found_yes_or_no(response), record["answer"]
    yes, true = float(said == "yes"), float(truth == "yes")
    both = yes * true
    return said, {
        "accuracy": float(said == truth),
        "precision": [both, yes],
        "recall": [both, true],
        "f1": [2 * both, yes + true],
        "yes_rate": yes,
    }


SUITES = (
    Suite(
        name="pope",
        title="POPE",
        paper="arXiv 2305.10355",
        cited="https://github.com/open-compass/VLMEvalKit/blob/e8e78f05/vlmeval/dataset/utils/yorn.py",
        layouts=(
            Layout(about="POPE's own files", columns=frozenset({"question_id", "image", "text", "label"}), question=_of_its_file),
            Layout(
                about="VLMEvalKit's TSV, or lmms-lab/POPE on the Hub, parquet",
                columns=frozenset({"question", "answer", "image"}),
                question=_of_a_table,
            ),
        ),
        figures={
            "accuracy": Figure(label="Accuracy"),
            "precision": Figure(label="Precision"),
            "recall": Figure(label="Recall"),
            "f1": Figure(label="F1"),
            "yes_rate": Figure(label="Says yes"),
        },
        mark=mark_yes_or_no,
        max_new_tokens=16,
    ),
)
