"""CHAIR (arXiv 1809.02156) on COCO's pictures, described: which objects an answer names that are not there, by rule.

Read from a folder with COCO's `annotations/` (`instances_*.json`, `captions_*.json`) and pictures beside these. It has no list of
questions: 500 of the pictures that are there are drawn, always the same, and asked to be described, as OPERA (arXiv 2311.17911) does.
How objects are found: `suites/objects/chair.py`; CHAIR's `synonyms.txt` is used where it lies in the folder, else COCO's 80 names.

Object HalBench (RLHF-V, arXiv 2312.00849) is the same on 300 questions of its own: `obj_halbench_300_with_image.jsonl` (`image_id`, `question`,
`image` in base64) beside the annotations. There a language model lists the objects of an answer first, and an answer of three words or fewer
names none: `object_halbench_judged` does so with `evaluate.judge`, `object_halbench` goes by rule alone. Their figures differ.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.data.images import ImageError, base64_bytes
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.suites.beside import PICTURE_FOLDERS, beside, picture_beside
from mmdpo_trainers.suites.judging import OBJECTS, SAMPLE, Judging, Record, listed_objects, question_of
from mmdpo_trainers.suites.objects.chair import Kinds, marks_of
from mmdpo_trainers.suites.objects.coco import annotation_files, annotations_of, images_of, kinds_of, synonyms_file
from mmdpo_trainers.suites.reading import text_of
from mmdpo_trainers.suites.suite import BadRow, Figure, Layout, Marks, Question, Row, Source, Suite

DRAWN = 500
"""Pictures that are described."""
_PROMPT = "Please describe this image in detail."
_QUESTIONS = "obj_halbench_300_with_image.jsonl"
_SHORTEST = 4
"""Words of an answer that a judge is asked about; a shorter one names nothing, as in Object HalBench."""
_LONGEST_NAME = 256
"""Characters; a longer cell is a picture in base64."""


def _folder(file: Path) -> Path:
    return file.parent.parent if file.parent.name == "annotations" else file.parent


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        raise DataError(f"{path}: expected the folder that holds COCO's annotations/ and pictures")
    return annotation_files(path)[0][:1]


def _questions(path: Path) -> list[Path]:
    return [path if path.is_file() else beside(path, (_QUESTIONS,), "Object HalBench")]


def _beside(path: Path) -> list[Path]:
    folder = path if path.is_dir() else path.parent
    synonyms = synonyms_file(folder)
    return [file for files in annotation_files(folder) for file in files] + ([] if synonyms is None else [synonyms])


def _common(path: Path) -> dict[str, Any]:
    kinds = kinds_of(path if path.is_dir() else path.parent)
    return {"kind_of": dict(kinds.kind_of), "source": kinds.source}


def _note(common: Mapping[str, Any]) -> str:
    return f"objects are told by {common['source']}"


def _drawn(file: Path) -> Iterator[dict[str, Any]]:
    """The pictures that are described: of those that are there, by their ids."""
    return iter(_chosen(file))


@functools.lru_cache(maxsize=2)
def _chosen(file: Path) -> list[dict[str, Any]]:
    folder, found = _folder(file), {}
    for entry in images_of(folder):
        places = (folder / place / str(entry["file_name"]) for place in PICTURE_FOLDERS)
        if any(place.is_file() for place in places):
            found[int(entry["id"])] = {"image_id": entry["id"], "file_name": entry["file_name"]}
    if not found:
        raise DataError(
            f"{folder} holds no picture of its annotations: expected them in it, or in val2014/, train2014/ or images/"
        )
    chosen = sorted(found)
    if len(chosen) > DRAWN:
        chosen = sorted(random.Random(0).sample(chosen, DRAWN))
    return [found[name] for name in chosen]


def _description(row: Row, source: Source) -> Question:
    return _asked(str(row["image_id"]), _PROMPT, picture_beside(source, [text_of(row, "file_name")]), source)


def _question(row: Row, source: Source) -> Question:
    name, image = text_of(row, "image_id"), row.get("image")
    picture: bytes | str
    if isinstance(image, str) and len(image) > _LONGEST_NAME:
        try:
            picture = base64_bytes(image)
        except ImageError as error:
            raise BadRow(error.reason, error.detail) from error
    else:
        named = [image] if isinstance(image, str) else []
        picture = picture_beside(source, [*named, *(f"COCO_{part}2014_{int(name):012}.jpg" for part in ("val", "train"))])
    return _asked(name, text_of(row, "question"), picture, source)


def _asked(name: str, question: str, picture: bytes | str, source: Source) -> Question:
    objects = annotations_of(_folder(source.file)).truth(name)
    if objects is None:
        raise BadRow("no_annotation", f"COCO's annotations have no picture {name}")
    return Question(id=name, text=question, pictures=[picture], answer="", more={"objects": objects})


def _kinds(record: Record) -> Kinds:
    return Kinds(record["common"]["kind_of"], record["common"]["source"])


_FIGURES = {
    "chair_i": Figure(label="CHAIR_i", lower_is_better=True),
    "recall": Figure(label="Recall of objects"),
    "words": Figure(label="Words an answer", kind="mean"),
}
_OF_CHAIR = {"chair_s": Figure(label="CHAIR_s", lower_is_better=True), **_FIGURES}
_OF_OBJECT_HALBENCH = {
    "chair_s": Figure(label="CHAIR_s, of answers that name objects", lower_is_better=True),
    **_FIGURES,
    "all_answers": Figure(label="CHAIR_s, of all answers", lower_is_better=True),
}
"""Object HalBench's response-level figure is of the answers that name an object of COCO's, CHAIR's of all."""


def _named(found: tuple[str, Marks]) -> tuple[str, Marks]:
    said, marks = found
    every, naming = marks.pop("all"), marks.pop("naming")
    return said, {"chair_s": naming, "all_answers": every, **marks}


def _mark(record: Record, response: str) -> tuple[str | None, Marks]:
    said, marks = _mark_by_rule(record, response)
    every = marks.pop("all")
    marks.pop("naming")
    return said, {"chair_s": every, **marks}


def _mark_naming(record: Record, response: str) -> tuple[str | None, Marks]:
    return _named(_mark_by_rule(record, response))


def _mark_by_rule(record: Record, response: str) -> tuple[str, Marks]:
    return marks_of(_kinds(record).found(response), record["objects"], len(response.split()))


def _to_list(record: Record, answer: Record) -> list[Mapping[str, Any]]:
    response = answer["response"]
    return [{"prompt": question_of(record), "response": response}] if len(response.split()) >= _SHORTEST else []


def _mark_listed(record: Record, answer: Record, found: Sequence[list[str] | None]) -> tuple[str | None, Marks]:
    names = found[0] if found else []
    if names is None:
        return None, {}
    return _named(marks_of(_kinds(record).listed(names), record["objects"], len(answer["response"].split())))


def _object_halbench(name: str, title: str, judging: Judging | None) -> Suite:
    columns = frozenset({"image_id", "question"})
    return Suite(
        name=name,
        title=title,
        paper="arXiv 2312.00849",
        cited="https://github.com/RLHF-V/RLHF-V/blob/main/eval/eval_gpt_obj_halbench.py",
        layouts=(Layout(about=_QUESTIONS, columns=columns, question=_question),),
        files=_questions,
        beside=_beside,
        common=_common,
        note=_note,
        figures=_OF_OBJECT_HALBENCH,
        mark=None if judging else _mark_naming,
        judging=judging,
        max_new_tokens=512,
    )


SUITES = (
    Suite(
        name="chair",
        title="CHAIR",
        paper="arXiv 1809.02156",
        cited="https://github.com/LisaAnne/Hallucination/blob/master/utils/chair.py",
        layouts=(Layout(about="COCO's annotations", columns=frozenset({"image_id", "file_name"}), question=_description),),
        files=_files,
        rows=_drawn,
        beside=_beside,
        common=_common,
        note=_note,
        figures=_OF_CHAIR,
        mark=_mark,
        max_new_tokens=512,
    ),
    _object_halbench("object_halbench", "Object HalBench, by rule", None),
    _object_halbench(
        "object_halbench_judged",
        "Object HalBench, objects listed by the judge",
        Judging(
            template="objects.txt.j2",
            form=OBJECTS,
            parse=listed_objects,
            asked=_to_list,
            marked=_mark_listed,
            sample={"prompt": "What is it?", "response": SAMPLE},
        ),
    ),
)
