"""Hallucinated answers beside the truth they were made of, and how many tries they took."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from mmdpo_trainers.data.sentences import plain_words, words_of
from mmdpo_trainers.files.json_lines import read_jsonl

from .. import plots
from ..comparison import PageInputs
from ..contents import Record, spread
from ..examples import Cell, image_of, question_of, text_of
from ..images import data_uri, sized
from ..numbers import number
from ..tables import Table

STAGE = "hallucinate"


def hallucinated(page: PageInputs) -> dict[str, Any]:
    """Truth and hallucination with the differing words marked, a histogram of similarities, a table of tries."""
    folder = page.run.folder / STAGE
    answers = list(read_jsonl(folder / "answers.jsonl")) if (folder / "answers.jsonl").is_file() else []
    summary = page.run.summaries.get(STAGE)
    return {
        "summary": summary,
        "table": _tries(page) if summary else None,
        "plot": _plot(page, answers) if answers else None,
        "answered": len(answers),
        "examples": [_example(record, folder) for record in spread([each for each in answers if _differs(each)], page.pairs)],
    }


def marked(truth: str, answer: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """The words of both texts, each with whether the other lacks it in that place; case and punctuation make no difference."""
    first, second = ([word for _, word in words_of(text)] for text in (truth, answer))
    plain, other = ([" ".join(plain_words(word)) for word in words] for words in (first, second))
    # Punctuation alone is nobody's difference, nor what keeps words apart.
    places, others = ([place for place, word in enumerate(words) if word] for words in (plain, other))
    differs, differs_too = set(places), set(others)
    matcher = difflib.SequenceMatcher(a=[plain[place] for place in places], b=[other[place] for place in others], autojunk=False)
    for block in matcher.get_matching_blocks():
        differs.difference_update(places[block.a : block.a + block.size])
        differs_too.difference_update(others[block.b : block.b + block.size])
    return [(word, place in differs) for place, word in enumerate(first)], [
        (word, place in differs_too) for place, word in enumerate(second)
    ]


def _tries(page: PageInputs) -> Table:
    """By arm the answers that took each number of tries, those without the truth to follow, still similar, and dropped."""
    names = {page.method.name: STAGE} | {
        name.split("/")[1]: name for name in page.run.summaries if name.startswith("arms/") and name.endswith(f"/{STAGE}")
    }
    found = {arm: summary for arm, name in names.items() if "tries" in (summary := page.run.summaries[name])}
    tries = sorted({int(place) for summary in found.values() for place in summary["tries"]})
    rows = []
    for arm, summary in found.items():
        counts = [f"{summary['tries'].get(str(place), 0):,}" for place in tries]
        lost = summary.get("lost", {}).get("reasons", {})
        rest = [summary["unguided"], summary["similar"], lost.get("same_words", 0), summary["pairs"]]
        rows.append(
            [
                page.method.name_of(arm),
                number(summary["hide"], "g"),
                *counts,
                *(f"{n:,}" for n in rest),
                number(summary["mean_similarity"], ".2f"),
            ]
        )
    return Table(
        caption="Answers by the tries they took; the last try has no truth to follow. Answers in the truth's own words make no pair.",
        head=[
            *("Arm", "Hidden", *(f"{place}. try" for place in tries)),
            *("Not guided", "Similar at last", "The truth's words", "Pairs", "Mean similarity"),
        ],
        rows=rows,
    )


def _plot(page: PageInputs, answers: list[Record]) -> str:
    values: dict[str, list[float]] = {"following the truth": [], "last try": []}
    for record in answers:
        values["following the truth" if record["sampled"]["guided"] else "last try"].append(
            float(record["sampled"]["similarity"])
        )
    threshold = float(page.config[STAGE]["max_similarity"])
    return plots.similarity_histogram({name: each for name, each in values.items() if each}, threshold)


def _differs(record: Record) -> bool:
    """Whether the answer is in other words than the truth, and so made a pair."""
    return plain_words(text_of(record["chosen"])) != plain_words(record["sampled"]["response"])


def _example(record: Record, folder: Path) -> dict[str, Any]:
    picture = image_of(record, 0, folder)
    truth, answer = marked(text_of(record["chosen"]), record["sampled"]["response"])
    return {
        "question": question_of(record["prompt"]),
        "cells": [] if picture is None else [Cell(uri=data_uri(sized(picture)), alt="The picture")],
        "truth": truth,
        "answer": answer,
        "sampled": record["sampled"],
        "similarity": number(record["sampled"]["similarity"], ".2f"),
    }
