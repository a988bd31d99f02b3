"""What the benchmark prints and writes into the results page."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.measure import markdown

GOALS = {"dpo": 2.2, "mdpo": 1.8, "best dpo": 2.8, "best mdpo": 2.4, "memory": 0.6, "questions": 4.5}
BASELINE = {"dpo": "TRL's `DPOTrainer`", "mdpo": "mDPO's official way"}


def text_of(result: dict[str, Any]) -> str:
    """Markdown of the parts that `result` holds."""
    pieces = [goals_of(result)]
    if "dpo" in result:
        pieces.append("Seconds a pair, median:\n\n" + _seconds(result))
    if "memory" in result:
        pieces.append("Peak memory of a step above the model:\n\n" + _memory(result["memory"]))
    if "best" in result:
        pieces.append(_best(result["best"]))
    if "features" in result:
        pieces.append("What each feature contributes (times faster than without any):\n\n" + _features(result["features"]))
    if "growth" in result:
        pieces.append("Growth (batch sizes with gradient checkpointing, the rest without):\n\n" + _growth(result["growth"]))
    return "\n\n".join(piece for piece in pieces if piece)


def goals_of(result: dict[str, Any]) -> str:
    """Markdown: what was asked for and what was found."""
    rows = []
    for method in ("dpo", "mdpo"):
        for kind, speed in result.get(method, {}).get("speed_up", {}).items():
            how = "with gradient checkpointing" if kind == "checkpointing" else "without checkpointing"
            rows.append(_faster(f"{method_name(method)} against {BASELINE[method]}, same settings, {how}", speed, GOALS[method]))
    for method, found in result.get("best", {}).items():
        what = f"{method_name(method)}, each at its best within {found['budget_bytes'] / 1e6:.0f} MB"
        rows.append(_faster(what, found["speed_up"], GOALS[f"best {method}"]))
    if "questions" in result:
        what = "DPO, four questions on each set of pictures, `group_by_pictures`"
        rows.append(_faster(what, result["questions"]["speed_up"], GOALS["questions"]))
    for method, shares in result.get("memory", {}).get("share", {}).items():
        for kind, share in shares.items():
            how = "with gradient checkpointing" if kind == "checkpointing" else "without checkpointing"
            met = "met" if share <= GOALS["memory"] else "missed"
            rows.append(
                [f"{method_name(method)}, share of peak memory, {how}", f"{share:.2f}", f"at most {GOALS['memory']}", met]
            )
    return markdown(["what", "times faster (min to max), or share", "goal", ""], rows) if rows else ""


def method_name(method: str) -> str:
    return {"dpo": "DPO", "mdpo": "mDPO"}[method]


def _faster(what: str, speed: dict[str, float], goal: float) -> list[str]:
    met = "met" if speed["median"] >= goal else "missed"
    return [what, _range(speed), f"at least {goal}", met]


def _range(speed: dict[str, float]) -> str:
    return f"{speed['median']:.2f} ({speed['min']:.2f} to {speed['max']:.2f})"


def _seconds(result: dict[str, Any]) -> str:
    rows = [
        [method_name(method), name, f"{statistics.median(times):.2f}"]
        for method in ("dpo", "mdpo")
        if method in result
        for name, times in result[method]["seconds_per_pair"].items()
    ]
    return markdown(["method", "way", "seconds a pair"], rows)


def _memory(memory: dict[str, Any]) -> str:
    rows = [
        [method_name(method), name, f"{peak / 1e6:.0f}"]
        for method, peaks in memory["peak_bytes_above_model"].items()
        for name, peak in peaks.items()
    ]
    return markdown(["method", "way", "MB"], rows)


def _best(best: dict[str, Any]) -> str:
    lines = [
        f"- {method_name(method)}, budget {found['budget_bytes'] / 1e6:.0f} MB: {found['settings']['baseline']} against "
        f"{found['settings']['ours']}"
        for method, found in best.items()
    ]
    return "Best settings within the budget:\n\n" + "\n".join(lines)


def _features(features: dict[str, Any]) -> str:
    seconds = features["seconds_per_pair"]
    rows = [
        [name, f"{statistics.median(seconds[name]):.2f}", f"{speed['median']:.2f}"]
        for name, speed in features["speed_up"].items()
    ]
    return markdown(["features", "seconds a pair", "times faster"], rows)


def _growth(growth: list[dict[str, Any]]) -> str:
    rows = [
        [
            row["what"],
            str(row["value"]),
            *(f"{statistics.median(row['seconds_per_pair'][name]):.2f}" for name in ("TRL", "ours")),
            f"{row['speed_up']['median']:.2f}",
        ]
        for row in growth
    ]
    return markdown(["what grows", "to", "TRL, seconds a pair", "ours", "times faster"], rows)
