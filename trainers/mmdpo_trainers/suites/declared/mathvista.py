"""MathVista (arXiv 2310.02255) in VLMEvalKit's TSV, whose `question` says how to answer.

Options are found as in other multiple choice; any other answer is compared as a number, or a text, where the whole response is one, which is
what VLMEvalKit accepts before it asks a judge to take the answer out of the response (`post_check`, vlmeval/dataset/utils/mathvista.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from mmdpo_trainers.suites.choice import ACCURACY, base64_pictures, letters, listed, true_letter
from mmdpo_trainers.suites.found import found_option
from mmdpo_trainers.suites.reading import text_of
from mmdpo_trainers.suites.suite import BadRow, Layout, Marks, Question, Row, Source, Suite

_CHOICE = "multi_choice"
_NUMBERS = {"integer": int, "float": float}


def _question(row: Row, source: Source) -> Question:
    kind, answer_type = text_of(row, "question_type"), str(row.get("answer_type", "text"))
    choices = letters(listed(text_of(row, "choices").strip())) if kind == _CHOICE else {}
    answer = true_letter(text_of(row, "answer_option"), choices) if choices else text_of(row, "answer")
    if not choices and answer_type in _NUMBERS and _number(answer, answer_type) is None:
        raise BadRow("no_answer", f"expected the answer to be of type {answer_type}, got {answer[:60]!r}")
    return Question(
        id=text_of(row, "index"),
        text=text_of(row, "question"),
        pictures=base64_pictures(text_of(row, "image")),
        answer=answer,
        choices=choices,
        groups={
            "task": [str(row["task"])] if "task" in row else [],
            "skill": listed(str(row["skills"]).strip()) if "skills" in row else [],
        },
        more={"answer_type": answer_type},
    )


def _number(text: str, kind: str) -> float | None:
    with contextlib.suppress(ValueError):
        return _NUMBERS[kind](text)
    return None


def _mark(record: Mapping[str, Any], response: str) -> tuple[str | None, Marks]:
    if record["choices"]:
        said = found_option(response, record["choices"])
        return said, {"accuracy": float(said == record["answer"])}
    kind = record["answer_type"]
    if kind in _NUMBERS:
        number = _number(response, kind)
        right = number is not None and number == _number(record["answer"], kind)
        return None if number is None else str(number), {"accuracy": float(right)}
    said = response.strip() or None
    return said, {"accuracy": float(said == record["answer"].strip())}


SUITES = (
    Suite(
        name="mathvista",
        title="MathVista",
        paper="arXiv 2310.02255",
        cited="https://github.com/open-compass/VLMEvalKit/blob/e8e78f05/vlmeval/dataset/utils/mathvista.py",
        layouts=(
            Layout(
                about="VLMEvalKit's TSV",
                columns=frozenset({"index", "question", "image", "answer", "question_type", "answer_type"}),
                question=_question,
            ),
        ),
        figures=ACCURACY,
        mark=_mark,
        max_new_tokens=256,
    ),
)
