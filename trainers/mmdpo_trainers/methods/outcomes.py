"""What a run's summary says of a method that trains on the model's own answers to augmented prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.files.atomic import read_json


def outcomes(folder: Path, arms: Sequence[str], pairs_stage: str) -> dict[str, Any]:
    """`accuracy` before and after, `pairs` by format, `dropped` by rule, what augment made and could not use; the same by arm; `rate`.

    pairs_stage: the one that makes what is trained on.
    """
    summary = _outcome(folder, pairs_stage)
    before, augment, pairs = (
        read_json(folder / stage / "summary.json", missing={}) for stage in ("evaluate/before", "augment", pairs_stage)
    )
    summary["accuracy"] = {"before": before.get("accuracy"), **summary["accuracy"]}
    summary["counts"] = {"evaluate": before.get("counts")}
    summary["match"] = {pairs_stage: pairs.get("match"), "evaluate": before.get("match")}
    summary["prompts"], summary["problems"] = augment.get("prompts"), augment.get("problems")
    rate = read_json(folder / "rate" / "summary.json", missing={})
    summary["rate"] = {name: value for name, value in rate.items() if name not in ("fingerprint", "seconds", "lost")} or None
    summary["arms"] = {arm: _outcome(folder / "arms" / arm, pairs_stage) for arm in arms}
    return summary


def _outcome(folder: Path, pairs_stage: str) -> dict[str, Any]:
    pairs, after = (read_json(folder / stage / "summary.json", missing={}) for stage in (pairs_stage, "evaluate/after"))
    return {"accuracy": {"after": after.get("accuracy")}, "pairs": pairs.get("pairs"), "dropped": pairs.get("dropped")}
