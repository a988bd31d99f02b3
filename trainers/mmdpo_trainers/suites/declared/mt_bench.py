"""MT-Bench (arXiv 2306.05685): 80 questions of two turns, of eight categories, without pictures; a judge scores each answer from 1 to 10.

Read from `question.jsonl` of FastChat (`fastchat/llm_judge/data/mt_bench` of https://github.com/lm-sys/FastChat: `question_id`, `category`,
`turns`), with the judge's reference answers from `reference_answer/*.jsonl` beside it (`question_id`, `choices[0].turns`) or in the question
(`reference`); questions of math, reasoning and coding are judged against these, as there, and without them are left out. The second turn
is asked with the model's own answer to the first, and judged with the whole conversation. All answers are greedy; the
released code samples, by category.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.answers.raters.prompts import plain
from mmdpo_trainers.suites.beside import beside, json_lines, texts_of
from mmdpo_trainers.suites.judging import SAMPLE, Judging, Record, rating, rating_form
from mmdpo_trainers.suites.reading import groups_of, text_of
from mmdpo_trainers.suites.suite import BadRow, Figure, Layout, Marks, Question, Row, Source, Suite

_LOWEST, _HIGHEST = 1, 10
_WITH_REFERENCE = ("math", "reasoning", "coding")


def _files(path: Path) -> list[Path]:
    return [path if path.is_file() else beside(path, ("question.jsonl",), "MT-Bench")]


def _beside(path: Path) -> list[Path]:
    return sorted((_files(path)[0].parent / "reference_answer").glob("*.jsonl"))


@functools.lru_cache(maxsize=4)
def _references(folder: Path) -> Mapping[str, list[str]]:
    """Question's id -> reference answers, of the first file by name that has it."""
    found: dict[str, list[str]] = {}
    for file in _beside(folder):
        for line in json_lines(file):
            choices = line.get("choices") or [{}]
            found.setdefault(str(line.get("question_id")), texts_of(choices[0], "turns"))
    return found


def _question(row: Row, source: Source) -> Question:
    name, turns, category = text_of(row, "question_id"), texts_of(row, "turns"), str(row.get("category", ""))
    if not turns:
        raise BadRow("no_turns", "column 'turns' is empty")
    references: list[str] = []
    if category in _WITH_REFERENCE:
        references = _references(source.file.parent).get(name) or texts_of(row, "reference")
        if len(references) < len(turns):
            raise BadRow(
                "no_reference", f"expected {len(turns)} reference answers, in reference_answer/*.jsonl, got {len(references)}"
            )
    return Question(
        id=name,
        text=turns[0],
        pictures=[],
        answer="",
        groups=groups_of(row, {"category": "category"}),
        more={"turns": turns, "references": references},
    )


def _further(record: Record, responses: Sequence[str]) -> list[dict[str, Any]] | None:
    turns = record["turns"]
    if len(responses) == len(turns):
        return None
    said = [{"role": "assistant", "content": plain(response)} for response in responses]
    asked = [{"role": "user", "content": turn} for turn in turns[: len(responses) + 1]]
    return [message for pair in zip(asked, said, strict=False) for message in pair] + asked[-1:]


def _asked(record: Record, answer: Record) -> list[Mapping[str, Any]]:
    turns = [
        {"question": question, "answer": response}
        for question, response in zip(record["turns"], answer["responses"], strict=False)
    ]
    return [
        {"turns": turns[:count], "references": record["references"][:count] if record["references"] else []}
        for count in range(1, len(turns) + 1)
    ]


def _marked(record: Record, answer: Record, found: Sequence[float | None]) -> tuple[str | None, Marks]:
    scores = {f"turn_{turn}": value for turn, value in enumerate(found, 1) if value is not None}
    if not scores:
        return None, {}
    said = ", ".join("?" if value is None else f"{value:g}" for value in found)
    return said, {"score": [sum(scores.values()), float(len(scores))], **scores}


SUITES = (
    Suite(
        name="mt_bench",
        title="MT-Bench",
        paper="arXiv 2306.05685",
        cited="https://github.com/lm-sys/FastChat/blob/main/fastchat/llm_judge/common.py",
        layouts=(Layout(about="question.jsonl", columns=frozenset({"question_id", "turns"}), question=_question),),
        files=_files,
        beside=_beside,
        figures={
            "score": Figure(label="Score, 1 to 10", kind="mean"),
            "turn_1": Figure(label="First turn", kind="mean"),
            "turn_2": Figure(label="Second turn", kind="mean"),
        },
        mark=None,
        further=_further,
        judging=Judging(
            template="mt_bench.txt.j2",
            form=rating_form("mt_bench", ("rating",), _LOWEST, _HIGHEST),
            parse=lambda reply: rating(reply, "rating", _LOWEST, _HIGHEST),
            asked=_asked,
            marked=_marked,
            sample={"turns": [{"question": "What is it?", "answer": SAMPLE}], "references": ["A red ball."]},
        ),
        max_new_tokens=1024,
    ),
)
