"""What was sampled in training: how often it made pairs, how it was rated, and some of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.methods.held_out import arm_folders

from .. import plots
from ..comparison import PageInputs
from ..contents import Record, spread
from ..examples import Cell, image_of, question_of
from ..images import data_uri, sized
from ..numbers import NONE, number, percent
from ..tables import Table

_HEAD = (
    "Arm",
    "Records asked",
    "Answers",
    "Pair",
    "Tie",
    "Not rated",
    "All cut",
    "Mean rating, first tenth",
    "Mean rating, last tenth",
)
_CURVES = {"Mean rating of sampled answers": ("mean_rating",), "Share of records": ("share", "ties", "cut", "unrated", "skipped")}


def sampled(page: PageInputs) -> dict[str, Any] | None:
    """Pairs of the policy's own answers, by arm; None where no arm samples."""
    arms = [name for name in page.comparison.summary["arms"] if name != page.method.name]
    found = {name: _lines(path) for name, path in arm_folders(page.run.folder, arms, page.method.name).items()}
    found = {name: lines for name, lines in found.items() if lines}
    if not found:
        return None
    rows = [[page.method.name_of(name), *_cells(lines)] for name, lines in found.items()]
    caption = "Of the records that the policy was asked in training, what came of its answers."
    shown = next(iter(found))
    return {
        "table": Table(caption=caption, head=_HEAD, rows=rows),
        "plots": _plots(page.run.log),
        "arm": page.method.name_of(shown),
        "pairs": _pairs(page, found[shown]),
    }


def _lines(path: Path) -> list[Record]:
    file = path / "train" / "online.jsonl"
    return list(read_jsonl(file)) if file.is_file() else []


def _cells(lines: Sequence[Record]) -> list[str]:
    outcomes = [line["outcome"] for line in lines]
    shares = [percent(outcomes.count(name) / len(lines)) for name in ("pair", "tie", "unrated", "cut")]
    tenth = max(1, len(lines) // 10)
    means = [_mean_rating(part) for part in (lines[:tenth], lines[-tenth:])]
    return [f"{len(lines):,}", f"{sum(len(line['answers']) for line in lines):,}", *shares, *means]


def _mean_rating(lines: Sequence[Record]) -> str:
    ratings = [rating for line in lines for rating in line["ratings"] if rating is not None]
    return number(sum(ratings) / len(ratings), ".2f") if ratings else NONE


def _plots(log: Sequence[Record]) -> list[str]:
    drawn: list[str] = []
    for title, names in _CURVES.items():
        lines: dict[str, Mapping[int, float]] = {
            name.replace("_", " "): {r["step"]: float(r[f"online/{name}"]) for r in log if r.get(f"online/{name}") is not None}
            for name in names
        }
        series = {label: (list(values), list(values.values())) for label, values in lines.items() if values}
        if series:
            drawn.append(plots.curve_plot(series, name=f"sampled-{len(drawn)}", title=title))
    return drawn


def _pairs(page: PageInputs, lines: Sequence[Record]) -> list[dict[str, Any]]:
    """Some of what was trained on, with the ratings."""
    records = {str(record["id"]): record for record in page.run.own_pairs}
    usable = [line for line in lines if line["trained"] == "sampled" and line["record"] in records]
    shown = []
    for line in spread(usable, page.pairs):
        record = records[line["record"]]
        picture = image_of(record, int(record.get("target") or 0), page.run.folder / "pairs") if record.get("images") else None
        answers = [
            (_role(line, index), text, NONE if rating is None else number(rating, ".2f"))
            for index, (text, rating) in enumerate(zip(line["answers"], line["ratings"], strict=True))
        ]
        cells = [] if picture is None else [Cell(uri=data_uri(sized(picture)), alt="The picture")]
        shown.append({"question": question_of(record["prompt"]), "step": line["step"], "cells": cells, "answers": answers})
    return shown


def _role(line: Record, index: int) -> str:
    return next((name.capitalize() for name in ("chosen", "rejected") if line[name] == index), "Answer")
