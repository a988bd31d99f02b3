"""What held-out pairs say in numbers: rewards and log-probability gaps, reward curves, a run's summary of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.files.json_lines import read_jsonl

if TYPE_CHECKING:
    # The command line knows methods before anything is opened.
    from mmdpo_trainers.data.corruption import Kind

CORRUPTIONS: tuple[Kind, ...] = ("crop", "blank")
"""Corrupted pictures of the evaluation, the same for every arm: a part of 1-20 % of the area, enlarged; mid-grey."""

BASE = "no training"
"""What the model before training is called beside the arms."""

ALL = "all"

Record = Mapping[str, Any]


def held_out_figures(
    records: Sequence[Record], base: Sequence[Record] | None = None, *, beta: float
) -> dict[str, dict[str, Any]]:
    """Figures of held-out pairs by `kind`, and of all of them ("all").

    records: with `logps` of "chosen", "rejected" and of the chosen response under each of `CORRUPTIONS`. base: the same records under
    the base model; None: these are the base's.

    Per kind: `pairs`; `preferred`, share of pairs with log p(chosen) > log p(rejected); `gap`, mean of log p(chosen | picture) -
    log p(chosen | corrupted) by corruption; mean `logps`; and given a base `rewards`, mean beta (log p - log p_base).
    """
    logps_before = {record["id"]: record["logps"] for record in base or ()}
    groups: dict[str, list[Record]] = {ALL: list(records)}
    for record in records:
        if record.get("kind"):
            groups.setdefault(str(record["kind"]), []).append(record)
    return {kind: _figures(groups[kind], logps_before if base is not None else None, beta) for kind in sorted(groups)}


def _figures(records: Sequence[Record], before: Mapping[str, Mapping[str, float]] | None, beta: float) -> dict[str, Any]:
    if not records:
        return {"pairs": 0}

    def mean(name: str) -> float:
        return statistics.fmean(record["logps"][name] for record in records)

    figures: dict[str, Any] = {
        "pairs": len(records),
        "preferred": statistics.fmean(float(r["logps"]["chosen"] > r["logps"]["rejected"]) for r in records),
        "gap": {name: mean("chosen") - mean(name) for name in CORRUPTIONS},
        "logps": {name: mean(name) for name in ("chosen", "rejected", *CORRUPTIONS)},
    }
    if before is not None:
        figures["rewards"] = {
            name: beta * statistics.fmean(r["logps"][name] - before[r["id"]][name] for r in records)
            for name in ("chosen", "rejected", *CORRUPTIONS)
        }
    return figures


def reward_curves(log: Iterable[Record]) -> dict[str, list[float | None]]:
    """`step`, and the rewards of chosen, rejected and corrupted responses (of each kind too) in each training log line."""
    lines = [line for line in log if "loss" in line]
    names = sorted({name for line in lines for name in line if _is_reward(name)})
    return {name: [line.get(name) for line in lines] for name in ("step", *names)}


def _is_reward(name: str) -> bool:
    side, _, rest = name.removeprefix("rewards/").partition("_")
    return name.startswith("rewards/") and side in ("chosen", "rejected", "corrupted") and rest not in ("accuracies", "margins")


def held_out_summary(folder: Path, arms: Iterable[str], *, main: str) -> dict[str, Any]:
    """The figures of a run that is evaluated on held-out pairs: of the base (`before`), and by arm after training.

    main: what the main arm is called, which is one of them. An arm has `accuracy` by group of questions, `held_out` as
    `held_out_figures`, and `curves`, its rewards over training.
    """
    return {
        "pairs": _done(folder / "pairs"),
        "before": _evaluation(folder / "evaluate" / "before"),
        "arms": {
            name: {**_evaluation(path / "evaluate" / "after"), "curves": _curves(path / "train" / "log.jsonl")}
            for name, path in arm_folders(folder, arms, main).items()
        },
    }


def arm_folders(folder: Path, arms: Iterable[str], main: str) -> dict[str, Path]:
    """Arm -> the folder that holds its stages, the main arm first."""
    return {main: folder, **{arm: folder / "arms" / arm for arm in arms}}


def _evaluation(folder: Path) -> dict[str, Any]:
    done = _done(folder) or {}
    return {name: done.get(name) for name in ("accuracy", "counts", "intervals", "held_out", "beta")}


def _curves(log: Path) -> dict[str, list[float | None]] | None:
    return reward_curves(read_jsonl(log)) if log.is_file() else None


def _done(folder: Path) -> dict[str, Any] | None:
    path = folder / "summary.json"
    if not path.is_file():
        return None
    return {name: value for name, value in read_json(path).items() if name not in ("fingerprint", "seconds")}


def over_seeds(summaries: Iterable[Record]) -> dict[str, dict[str, list[float]]]:
    """Arm ("no training" first) -> figure -> its value in each of the runs' summaries, for those that have it."""
    found: dict[str, dict[str, list[float]]] = {}
    for summary in summaries:
        for arm, figures in {BASE: summary["before"], **summary["arms"]}.items():
            values = found.setdefault(arm, {})
            for name, value in flat_figures(figures).items():
                values.setdefault(name, []).append(value)
    return found


def flat_figures(figures: Record) -> dict[str, float]:
    """`accuracy/<group>`, `gap/<kind>/<corruption>` and `reward/<kind>/<side>` of one arm."""
    flat = {f"accuracy/{group}": float(value) for group, value in (figures.get("accuracy") or {}).items()}
    for kind, held_out in (figures.get("held_out") or {}).items():
        for part, name in (("gap", "gap"), ("rewards", "reward")):
            flat |= {f"{name}/{kind}/{key}": float(value) for key, value in (held_out.get(part) or {}).items()}
    return flat
