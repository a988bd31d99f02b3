"""Multiple choice, as most benchmarks ask it: options of a row, the prompt of VLMEvalKit, marks."""

from __future__ import annotations

import ast
import string
from collections.abc import Mapping, Sequence
from typing import Any

from mmdpo_trainers.data.images import ImageError, base64_bytes
from mmdpo_trainers.suites.found import found_option
from mmdpo_trainers.suites.reading import text_of
from mmdpo_trainers.suites.suite import BadRow, Figure, Marks, Row, SameAs

ACCURACY = {"accuracy": Figure(label="Accuracy")}
CIRCULAR = {**ACCURACY, "each": Figure(label="Each order by itself", of_units=False)}
"""Of a benchmark that asks a question once for each order of its options: right where all of them are."""

_LONGEST_REFERENCE = 64
"""Characters; a longer cell is a picture, as VLMEvalKit tells them apart."""


def letters(options: Sequence[str]) -> dict[str, str]:
    """Options under A, B, …"""
    if len(options) > len(string.ascii_uppercase):
        raise BadRow("no_options", f"expected at most 26 options, got {len(options)}")
    return dict(zip(string.ascii_uppercase, options, strict=False))


def true_letter(answer: str, choices: Mapping[str, str]) -> str:
    """The letter of the truth, out of `B` or `(B)`. Raises BadRow where it names none of the choices."""
    letter = answer.strip().strip("()").strip().upper()
    if letter in choices:
        return letter
    if answer.strip().lower() == "hidden":
        raise BadRow("hidden_answer", "the answer is not published; give the files of a split whose answers are, such as val")
    raise BadRow("no_answer", f"expected the answer to be one of {', '.join(choices) or 'A, B, …'}, got {answer[:60]!r}")


def asked(row: Row, choices: Mapping[str, str]) -> str:
    """The question as VLMEvalKit puts it (`ImageMCQDataset.build_prompt`): a hint, the question, the options, and what to do."""
    hint = f"Hint: {row['hint']}\n" if "hint" in row else ""
    options = "".join(f"{letter}. {option}\n" for letter, option in choices.items())
    options = f"Options:\n{options}Please select the correct answer from the options above. \n" if choices else ""
    return f"{hint}Question: {text_of(row, 'question')}\n{options}"


def base64_pictures(cell: str) -> list[bytes | str] | SameAs:
    """A cell of VLMEvalKit's TSV: a picture in base64, a list of them as Python writes it, or the index of the row that has them."""
    cell = cell.strip()
    if len(cell) <= _LONGEST_REFERENCE:
        return SameAs(cell)
    try:
        return [base64_bytes(each) for each in listed(cell)]
    except ImageError as error:
        raise BadRow(error.reason, error.detail) from error


def listed(cell: str) -> list[str]:
    """A list of texts as Python writes it, or a text by itself. Raises BadRow where it opens like a list and is none."""
    if not (cell.startswith("[") and cell.endswith("]")):
        return [cell]
    try:
        found = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError) as error:
        raise BadRow("broken_row", f"{cell[:60]!r} is no list ({error})") from error
    return [str(each) for each in found]


def mark_choice(record: Mapping[str, Any], response: str) -> tuple[str | None, Marks]:
    """Right where the option found is the true one; where none can be told it is wrong, as VLMEvalKit counts without a judge."""
    said = found_option(response, record["choices"])
    right = float(said == record["answer"])
    return said, {"accuracy": right}


def mark_circular(record: Mapping[str, Any], response: str) -> tuple[str | None, Marks]:
    """The same; `each` counts the question by itself, where there are several orders of its options."""
    said, marks = mark_choice(record, response)
    return said, {**marks, "each": marks["accuracy"]} if record["circular"] else marks
