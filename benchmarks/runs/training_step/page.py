"""What the benchmark prints and writes into the results page."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.measure import markdown

GOALS = {"dpo": 2.2, "mdpo": 1.8, "best dpo": 2.8, "best mdpo": 2.4, "memory": 0.6, "questions": 4.5}
SHARE = 0.9
"""Of the arithmetic limit, in each row that has one."""
BASELINE = {"dpo": "TRL's `DPOTrainer`", "mdpo": "mDPO's official way"}


def text_of(result: dict[str, Any]) -> str:
    """Markdown of the parts that `result` holds."""
    pieces = [goals_of(result)]
    if "dpo" in result:
        pieces.append("Seconds and products of a pair, medians:\n\n" + _seconds(result))
    if "memory" in result:
        pieces.append("Peak memory of a step above the model:\n\n" + _memory(result["memory"]))
    if "best" in result:
        pieces.append(_best(result["best"]))
    if "features" in result:
        pieces.append("What each feature contributes (times faster than without any):\n\n" + _features(result["features"]))
    if "growth" in result:
        pieces.append("Growth (batch sizes with gradient checkpointing, the rest without):\n\n" + _growth(result["growth"]))
    if "loading" in result:
        pieces.append("What comes before a step, in the process that trains:\n\n" + _loading(result["loading"]))
    if "profile" in result:
        pieces.append(
            "Where a step's time goes, forward and backward, by operators (`torch.profiler`):\n\n" + _profile(result["profile"])
        )
    return "\n\n".join(piece for piece in pieces if piece)


def goals_of(result: dict[str, Any]) -> str:
    """Markdown: what was asked for and what was found."""
    rows = []
    for method in ("dpo", "mdpo"):
        for kind in result.get(method, {}).get("speed_up", {}):
            what = f"{method_name(method)} against {BASELINE[method]}, same settings, {_how(kind)}"
            rows.append(_faster(what, result[method], kind, GOALS[method]))
    for method, found in result.get("best", {}).items():
        what = f"{method_name(method)}, each at its best within {found['budget_bytes'] / 1e6:.0f} MB"
        rows.append(_faster(what, found, "best", GOALS[f"best {method}"]))
    if "questions" in result:
        what = "DPO, four questions on each set of pictures, `group_by_pictures`"
        rows.append(_faster(what, result["questions"], "questions", GOALS["questions"]))
    for method, shares in result.get("memory", {}).get("share", {}).items():
        for kind, share in shares.items():
            met = "met" if share <= GOALS["memory"] else "missed"
            what = f"{method_name(method)}, share of peak memory, {_how(kind)}"
            rows.append([what, f"{share:.2f}", "", "", f"at most {GOALS['memory']}", met])
    header = ["what", "times faster (min to max), or share of memory", "limit", "share of it", "goal", ""]
    return markdown(header, rows) if rows else ""


def _how(kind: str) -> str:
    return "with gradient checkpointing" if kind == "checkpointing" else "without checkpointing"


def method_name(method: str) -> str:
    return {"dpo": "DPO", "mdpo": "mDPO"}[method]


def _faster(what: str, found: dict[str, Any], kind: str, goal: float) -> list[str]:
    speed, limit, share = found["speed_up"][kind], *_limit(found, kind)
    met = "met" if speed["median"] >= goal and speed["median"] >= SHARE * found["limit"][kind] else "missed"
    return [what, _range(speed), limit, share, f"at least {goal}, {SHARE:.0%} of the limit", met]


def _limit(found: dict[str, Any], kind: str) -> tuple[str, str]:
    """The limit, and the share of it that was reached."""
    limit = found["limit"][kind]
    return f"{limit:.2f}", f"{found['speed_up'][kind]['median'] / limit:.0%}"


def _range(speed: dict[str, float]) -> str:
    return f"{speed['median']:.2f} ({speed['min']:.2f} to {speed['max']:.2f})"


def _seconds(result: dict[str, Any]) -> str:
    rows = []
    for method in ("dpo", "mdpo"):
        for name, times in result.get(method, {}).get("seconds_per_pair", {}).items():
            seconds, flop = statistics.median(times), result[method]["flop_per_pair"][name]
            rows.append([method_name(method), name, f"{seconds:.2f}", f"{flop / 1e9:.0f}", f"{flop / seconds / 1e9:.0f}"])
    return markdown(["method", "way", "seconds a pair", "products of a pair, GFLOP", "GFLOP a second"], rows)


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
        [name, f"{statistics.median(seconds[name]):.2f}", f"{speed['median']:.2f}", *_limit(features, name)]
        for name, speed in features["speed_up"].items()
    ]
    return markdown(["features", "seconds a pair", "times faster", "limit", "share of it"], rows)


def _growth(growth: list[dict[str, Any]]) -> str:
    rows = [
        [
            row["what"],
            str(row["value"]),
            *(f"{statistics.median(row['seconds_per_pair'][name]):.2f}" for name in ("TRL", "ours")),
            _range(row["speed_up"]["growth"]),
            *_limit(row, "growth"),
        ]
        for row in growth
    ]
    return markdown(["what grows", "to", "TRL, seconds a pair", "ours", "times faster", "limit", "share of it"], rows)


def _loading(loading: dict[str, Any]) -> str:
    rows = [
        [method_name(method), *(f"{statistics.median(times[name]) * 1e3:.1f}" for name in ("read", "collate"))]
        for method, times in loading["seconds_per_record"].items()
    ]
    return markdown(["method", "a record read, its pictures decoded, ms", "put into a batch, ms"], rows)


def _profile(profile: dict[str, Any]) -> str:
    kinds = list(next(iter(next(iter(profile.values())).values())))
    rows = [
        [method_name(method), name, *(f"{shares[kind]:.0%}" for kind in kinds)]
        for method, sides in profile.items()
        for name, shares in sides.items()
    ]
    return markdown(["method", "way", *kinds], rows)
