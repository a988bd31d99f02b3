"""LLaVA-Bench (In-the-Wild) (arXiv 2304.08485): 60 questions on 24 pictures; a judge scores the answer beside that of GPT-4,
which saw descriptions only.

Read from the folder liuhaotian/llava-bench-in-the-wild of the Hub: `questions.jsonl` (`question_id`, `image`, `text`, `category`),
`context.jsonl` (`image`, `caption`), `answers_gpt4.jsonl` (`question_id`, `text`), `images/`. The figure is the relative score: the answers'
scores in percent of the references'. As in `llava/eval/eval_gpt_review_bench.py` of https://github.com/haotian-liu/LLaVA the
judge reads the caption, and the reference comes first; each is scored from 1 to 10.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.answers.raters.parsing import parse_ratings
from mmdpo_trainers.suites.beside import beside, json_lines, picture_beside, texts_of
from mmdpo_trainers.suites.judging import SAMPLE, Judging, Record, question_of, rating_form
from mmdpo_trainers.suites.reading import groups_of, text_of
from mmdpo_trainers.suites.suite import BadRow, Figure, Layout, Marks, Question, Row, Source, Suite

_KEYS, _LOWEST, _HIGHEST = ("first", "second"), 1, 10


def _files(path: Path) -> list[Path]:
    return [path if path.is_file() else beside(path, ("questions.jsonl",), "LLaVA-Bench")]


def _beside(path: Path) -> list[Path]:
    folder = _files(path)[0].parent
    return [beside(folder, (name,), "LLaVA-Bench") for name in ("context.jsonl", "answers_gpt4.jsonl")]


@functools.lru_cache(maxsize=4)
def _context(folder: Path) -> Mapping[str, str]:
    found = {}
    for line in json_lines(folder / "context.jsonl"):
        found[str(line.get("image"))] = "\n".join(texts_of(line, "caption"))
    return found


@functools.lru_cache(maxsize=4)
def _references(folder: Path) -> Mapping[str, str]:
    lines = json_lines(folder / "answers_gpt4.jsonl")
    return {str(line.get("question_id")): str(line.get("text")) for line in lines}


def _question(row: Row, source: Source) -> Question:
    folder, name, image = source.file.parent, text_of(row, "question_id"), text_of(row, "image")
    if not _context(folder).get(image):
        raise BadRow("no_caption", f"context.jsonl has no caption of {image}")
    if name not in _references(folder):
        raise BadRow("no_reference", f"answers_gpt4.jsonl has no answer to question {name}")
    return Question(
        id=name,
        text=text_of(row, "text"),
        pictures=[picture_beside(source, [image])],
        answer=_references(folder)[name],
        groups=groups_of(row, {"category": "category"}),
        more={"contents": _context(folder)[image]},
    )


def _asked(record: Record, answer: Record) -> list[Mapping[str, Any]]:
    two = {"first": record["answer"], "second": answer["response"]}
    return [{"prompt": question_of(record), "contents": record["contents"], **two}]


def _marked(record: Record, answer: Record, found: Sequence[Mapping[str, float] | None]) -> tuple[str | None, Marks]:
    scores = found[0]
    if scores is None:
        return None, {}
    own, reference = scores["second"], scores["first"]
    return f"{own:g} beside {reference:g}", {"relative": [100.0 * own, reference], "own": own, "reference": reference}


SUITES = (
    Suite(
        name="llava_bench",
        title="LLaVA-Bench (In-the-Wild)",
        paper="arXiv 2304.08485",
        cited="https://github.com/haotian-liu/LLaVA/blob/main/llava/eval/eval_gpt_review_bench.py",
        layouts=(
            Layout(
                about="questions.jsonl",
                columns=frozenset({"question_id", "image", "text", "category"}),
                question=_question,
            ),
        ),
        files=_files,
        beside=_beside,
        figures={
            "relative": Figure(label="Score relative to the reference's, %", kind="mean"),
            "own": Figure(label="Score, 1 to 10", kind="mean"),
            "reference": Figure(label="The reference's score", kind="mean"),
        },
        mark=None,
        judging=Judging(
            template="llava_bench.txt.j2",
            form=rating_form("llava_bench", _KEYS, _LOWEST, _HIGHEST),
            parse=lambda reply: parse_ratings(reply, _KEYS, _LOWEST, _HIGHEST),
            asked=_asked,
            marked=_marked,
            sample={"prompt": "What is it?", "contents": "A red ball.", "first": "A ball.", "second": SAMPLE},
        ),
        max_new_tokens=1024,
    ),
)
