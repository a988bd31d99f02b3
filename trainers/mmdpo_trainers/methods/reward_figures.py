"""What a reward model's rewards of held-out pairs say in numbers, and a run's summary of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.methods.held_out import ALL, arm_folders

BINS = 5
"""Of the calibration, between even odds and certainty."""
BARS = 20
"""Of the histogram of margins."""

Record = Mapping[str, Any]


def reward_figures(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Figures of held-out pairs by `group`, or where they have none by `kind`, and of all of them ("all").

    records: with `rewards` of "chosen" and "rejected".

    Each: `pairs`; `right`, pairs whose chosen reward is the higher, and `accuracy`, their share; mean `margin` (chosen minus rejected),
    mean `rewards`, and `loss`, the mean of -log sigmoid(margin). Of all also `calibration` and `histogram`.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        name = record.get("group") or record.get("kind")
        if name:
            groups.setdefault(str(name), []).append(record)
    found = {name: _figures(groups[name]) for name in sorted(groups)}
    margins = [_margin(record) for record in records]
    found[ALL] = {**_figures(records), "calibration": calibration(margins), "histogram": histogram(margins)}
    return found


def _margin(record: Record) -> float:
    return float(record["rewards"]["chosen"] - record["rewards"]["rejected"])


def _figures(records: Sequence[Record]) -> dict[str, Any]:
    margins = [_margin(record) for record in records]
    right = sum(margin > 0 for margin in margins)
    return {
        "pairs": len(records),
        "right": right,
        "accuracy": right / len(records),
        "margin": statistics.fmean(margins),
        "rewards": {name: statistics.fmean(record["rewards"][name] for record in records) for name in ("chosen", "rejected")},
        "loss": statistics.fmean(_softplus(-margin) for margin in margins),
    }


def _softplus(value: float) -> float:
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def calibration(margins: Sequence[float]) -> list[dict[str, Any]]:
    """How often a pair is right beside how likely its margin says it is: bins of sigmoid(|margin|) from 0.5 to 1, those with pairs.

    Each: `low` and `high` of the bin, `pairs`, `predicted` (mean of sigmoid(|margin|)), `right`, how many have a margin above 0.
    """
    width = 0.5 / BINS
    bins: list[list[float]] = [[] for _ in range(BINS)]
    for margin in margins:
        bins[min(int((_sure(margin) - 0.5) / width), BINS - 1)].append(margin)
    return [
        {
            "low": 0.5 + width * number,
            "high": 0.5 + width * (number + 1),
            "pairs": len(each),
            "predicted": statistics.fmean(map(_sure, each)),
            "right": sum(margin > 0 for margin in each),
        }
        for number, each in enumerate(bins)
        if each
    ]


def _sure(margin: float) -> float:
    return 1 / (1 + math.exp(-abs(margin)))


def histogram(margins: Sequence[float]) -> dict[str, Any]:
    """`edges` of bars of one width, 0 among them, and `counts` of the margins in each bar, the upper edge left out but for the last."""
    widest = max((abs(margin) for margin in margins), default=0.0) or 1.0
    width = 2 * widest / BARS
    counts = [0] * BARS
    for margin in margins:
        counts[min(int((margin + widest) / width), BARS - 1)] += 1
    return {"edges": [width * (number - BARS // 2) for number in range(BARS + 1)], "counts": counts}


def rewards_summary(folder: Path, arms: Iterable[str], *, main: str) -> dict[str, Any]:
    """Of a run that trains reward models: `pairs`, and the `rewards` of held-out pairs of the untrained head (`before`) and by arm."""
    return {
        "pairs": read_json(path) if (path := folder / "pairs" / "summary.json").is_file() else None,
        "before": _rewards(folder / "evaluate" / "before"),
        "arms": {name: _rewards(path / "evaluate" / "after") for name, path in arm_folders(folder, arms, main).items()},
    }


def _rewards(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    return {"rewards": read_json(path).get("rewards")} if path.is_file() else {}
