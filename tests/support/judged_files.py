"""Benchmarks that a judge or annotations mark, in the files that they are published as, made of small pictures and few questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from published_files import in_base64, write_lines
from tiny_models import sample_pictures

from mmdpo_trainers.suites.objects.chair import COCO_KINDS


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
    return path


def picture(folder: Path, name: str, number: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sample_pictures(number + 1)[number].save(folder / name)


def mmhal(folder: Path) -> Path:
    """Three questions, of which the last has no picture."""
    rows = [
        {
            "question_type": kind,
            "question_topic": "outdoor",
            "image_id": f"id{number}",
            "image_src": f"https://example.org/there/{number}_o.jpg",
            "image_content": ["Ball", "Tree"],
            "question": f"what colour ? {number}",
            "gt_answer": "It is red.",
            "model_answer": "",
        }
        for number, kind in enumerate(("attribute", "counting", "counting"))
    ]
    for number in range(2):
        picture(folder / "images", f"{number}_o.jpg", number)
    write(folder / "response_template.json", rows)
    return folder


def mm_vet(folder: Path) -> Path:
    rows = {
        "v1_0": {"imagename": "v1_0.png", "question": "what is x ?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]},
        "v1_1": {"imagename": "v1_1.png", "question": "what is it ?", "answer": "a ball<OR>a globe", "capability": ["rec"]},
    }
    for number, row in enumerate(rows.values()):
        picture(folder / "images", str(row["imagename"]), number)
    write(folder / "mm-vet.json", rows)
    write(folder / "bard_set.json", ["v1_0"])
    return folder


def llava_bench(folder: Path) -> Path:
    """Three questions on one picture, of which the last has no reference answer."""
    picture(folder / "images", "001.jpg")
    kinds = ("conv", "detail", "complex")
    write_lines(
        folder / "questions.jsonl",
        [{"question_id": n, "image": "001.jpg", "category": kind, "text": f"what is it ? {n}"} for n, kind in enumerate(kinds)],
    )
    write_lines(folder / "context.jsonl", [{"id": 0, "image": "001.jpg", "caption": "A red ball in the grass."}])
    answers = [{"question_id": n, "answer_id": str(n), "model_id": "gpt-4", "text": f"A ball {n}."} for n in range(2)]
    write_lines(folder / "answers_gpt4.jsonl", answers)
    return folder


def mt_bench(folder: Path) -> Path:
    """Of three questions the last, of coding, has no reference answer."""
    folder.mkdir(parents=True)
    categories = ("writing", "math", "coding")
    write_lines(
        folder / "question.jsonl",
        [
            {"question_id": 81 + n, "category": category, "turns": [f"what is {n} ?", "which is red ?"]}
            for n, category in enumerate(categories)
        ],
    )
    (folder / "reference_answer").mkdir()
    reference = {"question_id": 82, "model_id": "gpt-4", "choices": [{"index": 0, "turns": ["It is 2.", "None is red."]}]}
    write_lines(folder / "reference_answer" / "gpt-4.jsonl", [reference])
    return folder


def alpaca_eval(folder: Path) -> Path:
    rows = [
        {
            "dataset": "helpful_base" if n else "koala",
            "instruction": f"name a colour {n}",
            "output": "Blue.",
            "generator": "other",
        }
        for n in range(2)
    ]
    return write(folder / "alpaca_eval.json", rows)


def coco(folder: Path, synonyms: bool = False) -> Path:
    """Annotations of pictures 1 (a dog, and by a caption a person) and 2 (a cat); both pictures in `val2014/`."""
    images = [{"id": number, "file_name": f"COCO_val2014_{number:012}.jpg"} for number in (1, 2)]
    instances = {
        "images": [*images, {"id": 3, "file_name": "not_there.jpg"}],
        "annotations": [
            {"image_id": 1, "category_id": 18},
            {"image_id": 2, "category_id": 17},
            {"image_id": 3, "category_id": 17},
        ],
        "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
    }
    write(folder / "annotations" / "instances_val2014.json", instances)
    captions = [{"image_id": 1, "caption": "A person with a dog."}, {"image_id": 2, "caption": "It sleeps."}]
    write(folder / "annotations" / "captions_val2014.json", {"images": images, "annotations": captions})
    for number, image in enumerate(images):
        picture(folder / "val2014", str(image["file_name"]), number)
    if synonyms:
        lines = [{"dog": "dog, puppy"}.get(name, name) for name in COCO_KINDS]
        (folder / "synonyms.txt").write_text("\n".join(lines))
    return folder


def object_halbench(folder: Path) -> Path:
    """Its questions beside the annotations, with pictures in base64, and of picture 9, which has no annotation."""
    coco(folder, synonyms=True)
    cell = in_base64(sample_pictures(1)[0])
    rows = [{"image_id": number, "question": "what is there ?", "image": cell} for number in (1, 2, 9)]
    write_lines(folder / "obj_halbench_300_with_image.jsonl", rows)
    return folder


def amber(folder: Path) -> Path:
    """Two descriptions, and two questions of yes and no."""
    queries = [
        {"id": n + 1, "image": f"AMBER_{n % 2}.jpg", "query": "Describe this image." if n < 2 else f"Is there a dog ? {n}"}
        for n in range(4)
    ]
    annotations = [
        {"id": 1, "type": "generative", "truth": ["dog", "grass"], "hallu": ["table"]},
        {"id": 2, "type": "generative", "truth": ["sky"], "hallu": []},
        {"id": 3, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 4, "type": "discriminative-attribute-state", "truth": "yes"},
    ]
    for number in range(2):
        picture(folder / "image", f"AMBER_{number}.jpg", number)
    write(folder / "data" / "query" / "query_all.json", queries)
    write(folder / "data" / "annotations.json", annotations)
    write(folder / "data" / "relation.json", {"dog": [], "grass": ["ground"], "table": ["desk"], "sky": [], "light": []})
    (folder / "data" / "safe_words.txt").write_text("light\n")
    return folder
