"""Mantis-Eval (arXiv 2405.01483), and NLVR2 (arXiv 1811.00491), which Mantis asks in the same form.

Parquet of the Hub (TIGER-Lab/Mantis-Eval, TIGER-Lab/NLVR2), or a JSON list with paths: `id`, `question_type` (`multi-choice`,
`short-answer`), `question`, `images`, `options`, `answer`, `category`. NLVR2 also in its own files (https://github.com/lil-lab/nlvr, an object
a line: `sentence`, `label`, `identifier`), with the pictures that its downloader saves: `-img0.png` and `-img1.png` behind the identifier
without its last number.

Prompts are those of mantis/benchmark of https://github.com/TIGER-AI-Lab/Mantis; options are found as in other multiple choice, and of a short
answer what follows "final answer:" or the like is compared, in any case.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmdpo_trainers.data.records import IMAGE_TOKEN
from mmdpo_trainers.suites.choice import ACCURACY, letters, mark_choice, true_letter
from mmdpo_trainers.suites.reading import embedded, groups_of, text_of
from mmdpo_trainers.suites.suite import BadRow, Layout, Marks, Question, Row, Source, Suite

_SHORT = "short-answer"
_ANNOUNCED = ("final answer:", "the answer is", "answer:")
_LETTER = re.compile(r"^\s*\(?([A-Z])[).:]\s*")
_LETTER_ONLY = "\nAnswer with the option's letter from the given choices directly."


def _question(row: Row, source: Source) -> Question:
    kind, pictures = text_of(row, "question_type"), embedded(row.get("images") or ())
    if not pictures:
        raise BadRow("no_picture", "column 'images' is empty")
    text = text_of(row, "question")
    if kind == _SHORT:
        choices: dict[str, str] = {}
        text = (
            f"Given the images, answer the following short answer vqa question:\nQ: {text}\n"
            'You can first give your analysis, and then give your final answer as "Final Answer:"'
        )
        answer = text_of(row, "answer").strip("()\n ")
    else:
        options = [str(each) for each in row.get("options") or ()]
        choices = letters([_LETTER.sub("", option) for option in options])
        text += _options(options) + _LETTER_ONLY
        answer = true_letter(text_of(row, "answer"), choices)
    # As many places as there are pictures: those that the question lacks come in front.
    text = IMAGE_TOKEN * (len(pictures) - text.count(IMAGE_TOKEN)) + text
    return Question(
        id=text_of(row, "id"),
        text=text,
        pictures=pictures,
        answer=answer,
        choices=choices,
        groups={**groups_of(row, {"category": "category"}), "kind": [kind]},
    )


def _options(options: Sequence[str]) -> str:
    """A line an option, with its letter where it has none."""
    named = zip(letters(options), options, strict=True)
    lines = [
        option if any(f"{letter}{mark}" in option.upper() for mark in "):.") else f"({letter}) {option}"
        for letter, option in named
    ]
    return "".join(f"\n {line}" for line in lines)


def _mark(record: Mapping[str, Any], response: str) -> tuple[str | None, Marks]:
    if record["choices"]:
        return mark_choice(record, response)
    said = response
    for words in _ANNOUNCED:
        if (place := response.lower().find(words)) >= 0:
            said = response[place + len(words) :]
            break
    said = said.strip()
    return said or None, {"accuracy": float(said.lower() == record["answer"].lower())}


def _statement(row: Row, source: Source) -> Question:
    """Between (A) True and (B) False."""
    name, label = text_of(row, "identifier"), text_of(row, "label").strip().lower()
    if label not in ("true", "false"):
        raise BadRow("no_answer", f"column 'label': expected True or False, got {label[:60]!r}")
    pair = name.rpartition("-")[0]
    choices = letters(["True", "False"])
    return Question(
        id=name,
        text=f"{IMAGE_TOKEN * 2} Here is a statement about the images. Is it true or false?\n{text_of(row, 'sentence')}"
        + _options(list(choices.values()))
        + _LETTER_ONLY,
        pictures=[f"{pair}-img0.png", f"{pair}-img1.png"],
        answer="A" if label == "true" else "B",
        choices=choices,
    )


_MANTIS = Layout(
    about="Mantis's form, parquet or JSON",
    columns=frozenset({"id", "question_type", "question", "images", "options", "answer"}),
    question=_question,
)
_CITED = "https://github.com/TIGER-AI-Lab/Mantis/blob/main/mantis/benchmark/eval.py"

SUITES = (
    Suite(
        name="mantis",
        title="Mantis-Eval",
        paper="arXiv 2405.01483",
        cited=_CITED,
        layouts=(_MANTIS,),
        figures=ACCURACY,
        mark=_mark,
        max_new_tokens=256,
    ),
    Suite(
        name="nlvr2",
        title="NLVR2",
        paper="arXiv 1811.00491",
        cited=_CITED,
        layouts=(
            _MANTIS,
            Layout(about="NLVR2's own files", columns=frozenset({"sentence", "label", "identifier"}), question=_statement),
        ),
        figures=ACCURACY,
        mark=_mark,
    ),
)
