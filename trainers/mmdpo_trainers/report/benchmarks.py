"""Figures of published benchmarks out of the marks of answers: by benchmark and group, with intervals, and their change by training.

A figure is the mean of its marks, or where these are numerators and denominators the ratio of their sums. Intervals, at 95 %: Wilson's for
shares of answers; for ratios and means the normal one, by linearisation (Cochran 1977, Sampling Techniques, chapter 6), which pairs the
answers of two models to one question.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.files.json_lines import read_jsonl

from .benchmark_tables import published_tables
from .intervals import Z95, Estimate, Proportion, paired_change

LIST = "benchmarks.json"
"""Key -> what a benchmark is: suite, title, paper, figures by name."""

Record = Mapping[str, Any]
Marked = dict[str, tuple[float, float]]
"""Unit -> numerator and denominator."""


def answers_file(key: str) -> str:
    """Where the answers to a benchmark are, beside the other answers of a moment."""
    return f"benchmark-{key}.jsonl"


def judged_file(key: str) -> str:
    """Where what a judge said of these answers is."""
    return f"judged-{key}.jsonl"


def figures_of(answers: Sequence[Record], described: Record) -> dict[str, Any]:
    """All that is said of a model on one benchmark.

    described: the benchmark's entry in `LIST`. Returns `questions`, `unread` (answers out of which nothing was read), `figures` (name -> value,
    interval, count) and `by` (kind of group -> group -> the same); where several pictures were asked about `attention`, and where a judge's
    replies were none `unjudged`, their number by reason.
    """
    marked = [answer for answer in answers if answer.get("marks") is not None]
    units = {str(answer["unit"]) for answer in marked}
    found = {"suite": described["suite"], "title": described["title"], "questions": len(units)}
    whole = _figures(marked, described)
    if (kind := described.get("mean_of")) and (mean := _mean_of_groups(marked, described, kind)):
        whole[f"mean_of_{kind}"] = mean
    by: dict[str, dict[str, Any]] = {}
    for kind, names in _groups(marked).items():
        by[kind] = {name: _figures(_in_group(marked, kind, name), described) for name in names}
    unread = sum(answer.get("said") is None for answer in marked)
    looked = attention_of(answers)
    lost = {"lost": described["lost"]} if "lost" in described else {}
    unjudged = Counter(problem["reason"] for answer in answers for problem in answer.get("problems", ()))
    more = {"attention": looked, "unjudged": dict(unjudged)}
    return {**found, "unread": unread, "figures": whole, "by": by, **{name: each for name, each in more.items() if each}, **lost}


def changes_of(before: Sequence[Record], after: Sequence[Record], described: Record) -> dict[str, Any]:
    """`figures` and `by` as `figures_of` has them, each figure `value` and `interval` of after minus before, paired by question; null where
    fewer than two questions have both."""
    by = {
        kind: {name: _changes(_in_group(before, kind, name), _in_group(after, kind, name), described) for name in names}
        for kind, names in _groups([*before, *after]).items()
    }
    return {"figures": _changes(before, after, described), "by": by}


def _changes(before: Sequence[Record], after: Sequence[Record], described: Record) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, figure in described["figures"].items():
        change = _change(*(_marked(answers, name, figure["of_units"]) for answers in (before, after)))
        known = change is not None and math.isfinite(change.high - change.low)
        found[name] = (
            None if change is None else {"value": change.value, "interval": [change.low, change.high] if known else None}
        )
    for name, figure in _sums(described):
        found[name] = _sum([(weight, found[part]) for part, weight in figure["sum_of"].items()], 0.0)
    return found


def attention_of(answers: Sequence[Record]) -> dict[str, Any]:
    """Of questions with several pictures: `count`, `largest` (mean share of the picture that was looked at most), and where the file says
    which picture is asked about `ratio`, its mean share. Empty where there are none."""
    shares = [[part / sum(a["attention"]) for part in a["attention"]] for a in answers if sum(a.get("attention") or ())]
    if not shares:
        return {}
    ratios = [float(answer["ratio"]) for answer in answers if answer.get("ratio") is not None]
    found: dict[str, Any] = {"count": len(shares), "largest": statistics.fmean(map(max, shares))}
    return {**found, "ratio": statistics.fmean(ratios)} if ratios else found


def _figures(answers: Sequence[Record], described: Record) -> dict[str, Any]:
    found = {}
    for name, figure in described["figures"].items():
        marks = _marked(answers, name, figure["of_units"])
        if marks:
            found[name] = _as_json(_ratio(marks, figure["kind"] == "share"), len(marks))
    sums = {}
    for name, figure in _sums(described):
        parts = [(weight, found.get(part)) for part, weight in figure["sum_of"].items()]
        if total := _sum(parts, figure["plus"]):
            sums[name] = {**total, "count": sum(part["count"] for _, part in parts if part)}
    return {**sums, **found}


def _sums(described: Record) -> list[tuple[str, Record]]:
    """Figures that are sums of others."""
    return [(name, figure) for name, figure in described["figures"].items() if figure["sum_of"]]


def _sum(parts: Sequence[tuple[float, Record | None]], plus: float) -> dict[str, Any] | None:
    """Value and interval of a weighted sum of figures of different questions, whose errors have nothing to do with each other.

    None where one is missing; without a value where one has none.
    """
    known = [(weight, part) for weight, part in parts if part is not None]
    if len(known) < len(parts):
        return None
    if any(part["value"] is None for _, part in known):
        return {"value": None, "interval": None}
    value = plus + sum(weight * part["value"] for weight, part in known)
    if any(part["interval"] is None for _, part in known):
        return {"value": value, "interval": None}
    # Intervals of shares are not symmetric: each end by the ends that move the sum that way.
    ends = [sorted(weight * (end - part["value"]) for end in part["interval"]) for weight, part in known]
    low, high = (math.hypot(*(end[side] for end in ends)) for side in (0, 1))
    return {"value": value, "interval": [value - low, value + high]}


def _as_json(estimate: Estimate | None, count: int) -> dict[str, Any]:
    """A figure whose denominator is 0 has no value, such as precision where nobody said yes; a mean of one answer no interval."""
    if estimate is None:
        return {"value": None, "interval": None, "count": count}
    known = math.isfinite(estimate.high - estimate.low)
    return {"value": estimate.value, "interval": [estimate.low, estimate.high] if known else None, "count": count}


def _marked(answers: Sequence[Record], name: str, of_units: bool) -> Marked:
    """The marks of a figure; of several answers of one unit the least."""
    found: Marked = {}
    for answer in answers:
        mark = (answer.get("marks") or {}).get(name)
        if mark is None:
            continue
        pair = (float(mark[0]), float(mark[1])) if isinstance(mark, Sequence) else (float(mark), 1.0)
        unit = str(answer["unit"] if of_units else answer["id"])
        found[unit] = min(found.get(unit, pair), pair)
    return found


def _ratio(marks: Marked, is_share: bool) -> Estimate | None:
    top, bottom = (sum(values) for values in zip(*marks.values(), strict=True))
    if not bottom:
        return None
    if is_share and all(a in (0, 1) and b in (0, 1) and a <= b for a, b in marks.values()):
        share = Proportion(round(top), round(bottom))
        return Estimate(share.value, share.low, share.high)
    value = top / bottom
    half = _half_width(list(_effects(marks).values()))
    low, high = value - half, value + half
    return Estimate(value, max(0.0, low), min(1.0, high)) if is_share and math.isfinite(half) else Estimate(value, low, high)


def _effects(marks: Marked) -> dict[str, float]:
    """How much each unit moves the ratio, times their number; these add up to 0."""
    top, bottom = (sum(values) for values in zip(*marks.values(), strict=True))
    mean = bottom / len(marks)
    return {unit: (a - top / bottom * b) / mean for unit, (a, b) in marks.items()}


def _half_width(effects: Sequence[float]) -> float:
    return Z95 * statistics.stdev(effects) / math.sqrt(len(effects)) if len(effects) > 1 else math.inf


def _change(before: Marked, after: Marked) -> Estimate | None:
    units = before.keys() & after.keys()
    if len(units) < 2:
        return None
    old, new = ({unit: marks[unit] for unit in sorted(units)} for marks in (before, after))
    if all(old[unit][1] == new[unit][1] and mark in ((0, 0), (0, 1), (1, 1)) for unit in old for mark in (old[unit], new[unit])):
        # Shares of the same questions.
        counted = [unit for unit in old if old[unit][1]]
        return paired_change(*({unit: bool(marks[unit][0]) for unit in counted} for marks in (old, new)))
    sums = [[sum(values) for values in zip(*marks.values(), strict=True)] for marks in (old, new)]
    if not (sums[0][1] and sums[1][1]):
        return None
    value = sums[1][0] / sums[1][1] - sums[0][0] / sums[0][1]
    first, second = _effects(old), _effects(new)
    # Answers that are all alike say nothing of how far they may vary.
    half = _half_width([second[unit] - first[unit] for unit in first]) or math.inf
    return Estimate(value, value - half, value + half)


def _mean_of_groups(answers: Sequence[Record], described: Record, kind: str) -> dict[str, Any] | None:
    """The first figure, a share, averaged over the groups of a kind; of each the variance has one more of either outcome than was seen."""
    name, figure = next(iter(described["figures"].items()))
    groups = [_marked(_in_group(answers, kind, group), name, figure["of_units"]) for group in _groups(answers).get(kind, ())]
    groups = [marks for marks in groups if marks]
    if len(groups) < 2:
        return None
    values, variance = [], 0.0
    for marks in groups:
        right, count = sum(top for top, _ in marks.values()), len(marks)
        values.append(right / count)
        p = (right + 1) / (count + 2)
        variance += p * (1 - p) / (count + 2)
    mean, half = statistics.fmean(values), Z95 * math.sqrt(variance) / len(values)
    return _as_json(Estimate(mean, max(0.0, mean - half), min(1.0, mean + half)), len(values))


def _groups(answers: Sequence[Record]) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for answer in answers:
        for kind, names in answer["groups"].items():
            found.setdefault(kind, set()).update(names)
    return {kind: sorted(names) for kind, names in found.items()}


def _in_group(answers: Sequence[Record], kind: str, name: str) -> list[Record]:
    return [answer for answer in answers if name in answer["groups"].get(kind, ())]


def benchmarks_of(folder: Path) -> tuple[dict[str, Any], dict[str, list[Record]]]:
    """What benchmarks an evaluation in this folder has, and the answers to each; nothing where it has none."""
    described = dict(read_json(folder / LIST, missing={}))
    files = {key: folder / (judged_file(key) if each["judged"] else answers_file(key)) for key, each in described.items()}
    return described, {key: list(read_jsonl(file)) for key, file in files.items() if file.is_file()}


def benchmark_summary(folders: Mapping[str, Path]) -> dict[str, Any]:
    """What evaluations say of benchmarks; empty where none has any.

    folders: who was asked (`before`, `after`, an arm) -> the folder of its evaluation. Returns `models` (who -> key -> `figures_of`), `changes`
    (who -> key -> `changes_of` against before) and `tables` (`published_tables`).
    """
    asked = {who: benchmarks_of(folder) for who, folder in folders.items()}
    asked = {who: found for who, found in asked.items() if found[1]}
    if not asked:
        return {}
    models = {
        who: {key: figures_of(own, described[key]) for key, own in answers.items()} for who, (described, answers) in asked.items()
    }
    base = asked.get("before", ({}, {}))[1]
    changes = {
        who: {key: changes_of(base[key], own, described[key]) for key, own in answers.items() if key in base}
        for who, (described, answers) in asked.items()
        if who != "before"
    }
    described = {key: each for found, _ in asked.values() for key, each in found.items()}
    return {"benchmarks": described, "models": models, "changes": changes, "tables": published_tables(models)}


def notes_of(summary: Record) -> list[str]:
    """What readers of a `benchmark_summary` have to know of its figures: who judged, by what objects are told, what was not judged."""
    found = []
    for key, each in summary["benchmarks"].items():
        name = each["title"] if key == each["suite"] else f"{key} ({each['title']})"
        said = [each["note"]] if "note" in each else []
        if judge := each.get("judge"):
            own = "a prompt of the user's" if judge["template"] else "a prompt of this project's"
            said.append(f"marked by {judge['name']} with {own}, so not to be set beside figures of another judge or prompt")
        lost = ", ".join(
            f"{count:,} {who.replace('_', ' ')} ({reason})"
            for who, models in summary["models"].items()
            for reason, count in models.get(key, {}).get("unjudged", {}).items()
        )
        said += [f"judgements missing: {lost}"] if lost else []
        found += [f"{name}: {'; '.join(said)}."] if said else []
    return found
