"""MM-Vet (arXiv 2308.02490): 218 open questions, each of one or more capabilities; a judge says how correct an answer is, from 0 to 1.

Read from `mm-vet.json` of https://github.com/yuweihao/MM-Vet (id -> `imagename`, `question`, `answer`, `capability`), with `images/`
beside it. `<AND>` and `<OR>` in an answer are explained to the judge. Shown in percent, as there: the mean, by capability, and
by the capabilities that a question needs together. The released code asks again with more randomness where a reply is none, and then counts 0;
here such an answer is counted and left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.suites.beside import beside, picture_beside, rows_by_key, texts_of
from mmdpo_trainers.suites.judging import SAMPLE, Judging, Record, question_of, rating, rating_form
from mmdpo_trainers.suites.reading import text_of
from mmdpo_trainers.suites.suite import Figure, Layout, Marks, Question, Row, Source, Suite


def _files(path: Path) -> list[Path]:
    return [path if path.is_file() else beside(path, ("mm-vet.json",), "MM-Vet")]


def _question(row: Row, source: Source) -> Question:
    capabilities = sorted(texts_of(row, "capability"))
    return Question(
        id=str(row["key"]),
        text=text_of(row, "question"),
        pictures=[picture_beside(source, [text_of(row, "imagename")])],
        answer=text_of(row, "answer"),
        groups={"capability": capabilities, "together": [" + ".join(capabilities)]} if capabilities else {},
    )


def _asked(record: Record, answer: Record) -> list[Mapping[str, Any]]:
    truth = record["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return [{"prompt": question_of(record), "answer": truth, "response": answer["response"]}]


def _marked(record: Record, answer: Record, found: Sequence[float | None]) -> tuple[str | None, Marks]:
    value = found[0]
    return (None, {}) if value is None else (f"{value:g}", {"score": value})


SUITES = (
    Suite(
        name="mm_vet",
        title="MM-Vet",
        paper="arXiv 2308.02490",
        cited="https://github.com/yuweihao/MM-Vet/blob/main/mm-vet_evaluator.py",
        layouts=(
            Layout(
                about="mm-vet.json",
                columns=frozenset({"key", "imagename", "question", "answer", "capability"}),
                question=_question,
            ),
        ),
        files=_files,
        rows=rows_by_key,
        figures={"score": Figure(label="Score")},
        mark=None,
        judging=Judging(
            template="mm_vet.txt.j2",
            form=rating_form("mm_vet", ("score",), 0, 1),
            parse=lambda reply: rating(reply, "score", 0, 1),
            asked=_asked,
            marked=_marked,
            sample={"prompt": "What is it?", "answer": "red <AND> ball", "response": SAMPLE},
        ),
        max_new_tokens=512,
    ),
)
