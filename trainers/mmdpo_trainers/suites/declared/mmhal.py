"""MMHal-Bench (LLaVA-RLHF, arXiv 2309.14525): 96 questions of eight types; a judge says how informative an answer is and whether it makes
something up.

Read from `response_template.json` of Shengcao1006/MMHal-Bench on the Hub (RLHF-V has it as `mmhal-bench_answer_template.json`): a list of
`question_type`, `question_topic`, `image_content`, `question`, `gt_answer`, and `image_src`, an address, whose last part is the picture's
name in the folder or its `images/`. The judge is told what the picture holds and a person's answer. Ratings from 0 to 6, below 3
a hallucination, as in `Eval/eval_gpt_mmhal.py` of https://github.com/llava-rlhf/LLaVA-RLHF; there an unread reply counts as 0,
here it is counted and left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.suites.beside import beside, picture_beside, texts_of
from mmdpo_trainers.suites.judging import SAMPLE, Judging, Record, question_of, rating, rating_form
from mmdpo_trainers.suites.reading import groups_of, text_of
from mmdpo_trainers.suites.suite import Figure, Layout, Marks, Question, Row, Source, Suite

_LOWEST, _HIGHEST, _TRUTHFUL = 0, 6, 3


def _files(path: Path) -> list[Path]:
    names = ("response_template.json", "mmhal-bench_answer_template.json")
    return [path if path.is_file() else beside(path, names, "MMHal-Bench")]


def _question(row: Row, source: Source) -> Question:
    names = [str(row[name]).rpartition("/")[2] for name in ("image_path", "image_src") if name in row]
    names += [f"{row['image_id']}{suffix}" for suffix in (".jpg", ".png") if "image_id" in row]
    return Question(
        id=str(source.number),
        text=text_of(row, "question"),
        pictures=[picture_beside(source, names)],
        answer=text_of(row, "gt_answer"),
        groups=groups_of(row, {"type": "question_type"}),
        more={"contents": ", ".join(texts_of(row, "image_content")) or "nothing is listed"},
    )


def _asked(record: Record, answer: Record) -> list[Mapping[str, Any]]:
    names = ("contents", "answer")
    return [{**{name: record[name] for name in names}, "prompt": question_of(record), "response": answer["response"]}]


def _marked(record: Record, answer: Record, found: Sequence[float | None]) -> tuple[str | None, Marks]:
    value = found[0]
    return (None, {}) if value is None else (f"{value:g}", {"score": value, "hallucination_rate": float(value < _TRUTHFUL)})


SUITES = (
    Suite(
        name="mmhal",
        title="MMHal-Bench",
        paper="arXiv 2309.14525",
        cited="https://github.com/llava-rlhf/LLaVA-RLHF/blob/main/Eval/eval_gpt_mmhal.py",
        layouts=(
            Layout(
                about="response_template.json",
                columns=frozenset({"question_type", "image_content", "question", "gt_answer"}),
                question=_question,
            ),
        ),
        files=_files,
        figures={
            "score": Figure(label="Score, 0 to 6", kind="mean"),
            "hallucination_rate": Figure(label="Hallucination rate", lower_is_better=True),
        },
        mark=None,
        judging=Judging(
            template="mmhal.txt.j2",
            form=rating_form("mmhal", ("rating",), _LOWEST, _HIGHEST),
            parse=lambda reply: rating(reply, "rating", _LOWEST, _HIGHEST, whole=True),
            asked=_asked,
            marked=_marked,
            sample={"prompt": "What is it?", "contents": "Ball", "answer": "A red ball.", "response": SAMPLE},
        ),
        max_new_tokens=512,
    ),
)
