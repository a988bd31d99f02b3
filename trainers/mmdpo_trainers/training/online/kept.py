"""`online.jsonl`: every answer that was sampled in training, its rating, and what was trained on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.files.atomic import write_atomic
from mmdpo_trainers.files.json_lines import JsonLines, read_jsonl

ONLINE = "online.jsonl"
"""File of `output_dir`."""


def rewind(path: Path, step: int) -> None:
    """Leave the lines up to this optimizer step: those of later ones are made again, alike."""
    if not path.exists():
        return
    with JsonLines(path):
        pass  # takes a torn last line away
    kept = (line for line in read_jsonl(path) if line["step"] <= step)
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Add a step's lines.

    A line has `id` (step and record), `step` (counted from 1), `record`, `answers`, `ended` and `ratings` (null: none; penalties are in
    them), `outcome` (`choice.Outcome`), the indices `chosen` and `rejected`, `trained`: what of the record was trained on in the step
    (`sampled`, `offline`, or nothing: `skipped`), and `problems`, of ratings that lack.
    """
    with JsonLines(path) as out:
        out.append(lines)


def online_summary(path: Path) -> dict[str, Any]:
    """What a training sampled: records, answers, what came of them, and what was trained on in place of no pair."""
    lines = list(read_jsonl(path)) if path.is_file() else []
    ratings = [rating for line in lines for rating in line["ratings"] if rating is not None]
    return {
        "records": len(lines),
        "answers": sum(len(line["answers"]) for line in lines),
        "outcomes": dict(sorted(Counter(line["outcome"] for line in lines).items())),
        "trained": dict(sorted(Counter(line["trained"] for line in lines).items())),
        "mean_rating": sum(ratings) / len(ratings) if ratings else None,
    }
