"""Questions and pairs as they are, with their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mmdpo_trainers.data.corruption import Corruption, corrupt
from mmdpo_trainers.methods.held_out import BASE, CORRUPTIONS

from ..comparison import PageInputs, group_of
from ..contents import Record, spread
from ..examples import Cell, image_of, question_of, text_of
from ..images import data_uri, sized


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question with its picture, corrupted versions of it, and the answers by arm as (arm, answer, right)."""

    question: str
    truth: str
    cells: list[Cell]
    answers: list[tuple[str, str, bool]]


def examples(page: PageInputs) -> dict[str, Any] | None:
    """Answers of every arm to some questions; None before any arm is evaluated."""
    answers = page.comparison.answers
    trained = [arm for arm in answers if arm != BASE]
    asked = len(answers.get(BASE, {}))
    return {"examples": _examples(page), "asked": f"{asked:,}"} if asked and trained else None


def pairs(page: PageInputs) -> dict[str, Any]:
    """Pairs that were given."""
    made = (page.run.folder / "pairs" / "pairs.jsonl").is_file()
    return {"pairs": _pair_examples(page.run.folder / "pairs", page.run.own_pairs, page.pairs), "made": made}


def _examples(page: PageInputs) -> list[Example]:
    """Questions on which the base and some arm differ, spread over the groups, and some more."""
    contents, count, seed = page.comparison, page.pairs, int(page.config.get("seed", 0))
    base = contents.answers.get(BASE, {})
    by_group: dict[str, list[Record]] = {}
    for answer in base.values():
        others = [answers[answer["id"]] for arm, answers in contents.answers.items() if arm != BASE and answer["id"] in answers]
        if answer.get("images") and any(other["correct"] != answer["correct"] for other in others):
            by_group.setdefault(group_of(answer), []).append(answer)
    each = -(-count // len(by_group)) if by_group else 0
    folder = page.run.folder / "evaluate" / "before"
    return [_example(page, record, folder, seed) for group in sorted(by_group) for record in spread(by_group[group], each)]


def _example(page: PageInputs, record: Record, folder: Path, seed: int) -> Example:
    answers = {arm: found[record["id"]] for arm, found in page.comparison.answers.items() if record["id"] in found}
    return Example(
        question=question_of(record["prompt"]),
        truth=str(record["answer"]),
        cells=_cells(record, folder, seed),
        answers=[(page.method.name_of(arm), str(answer["response"]), bool(answer["correct"])) for arm, answer in answers.items()],
    )


def _cells(record: Record, folder: Path, seed: int) -> list[Cell]:
    """The asked-about picture and a draw of each corruption of it."""
    picture = image_of(record, int(record.get("target") or 0), folder)
    if picture is None:
        return []
    shown: dict[str, Image.Image] = {"picture": picture}
    for kind in CORRUPTIONS:
        shown[kind] = corrupt(picture, Corruption(kind=kind, seed=seed), str(record["id"]))
    return [Cell(uri=data_uri(sized(each)), alt=name.capitalize(), caption=name) for name, each in shown.items()]


def _pair_examples(folder: Path, records: Sequence[Record], count: int) -> list[dict[str, Any]]:
    shown = []
    for record in spread(records, count):
        picture = image_of(record, 0, folder) if record.get("images") else None
        cells = [] if picture is None else [Cell(uri=data_uri(sized(picture)), alt="The picture")]
        texts = {side: text_of(record[side]) if record.get(side) is not None else "–" for side in ("chosen", "rejected")}
        shown.append({"question": question_of(record["prompt"]), "cells": cells, **texts})
    return shown
