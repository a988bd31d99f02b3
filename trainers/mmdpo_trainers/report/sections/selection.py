"""What selection kept and dropped, the ratios that it looked at, and pairs that it made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdpo_trainers.methods.selection import RULES

from .. import plots
from ..comparison import PageInputs
from ..contents import Record, RunContents, by_format, label_of, spread, verdict
from ..examples import Cell, image_cells, question_of, text_of
from ..heatmaps import HeatMaps
from ..tables import Group, Table

RULE_WORDS = {
    "no_truth": "the prompt has no true answer",
    "empty_response": "the model answered nothing",
    "no_threshold": "no threshold for this number of pictures",
    "no_ratio": "no attention ratio",
    "ratio": "enough attention on the target",
    "no_rating": "the judge gave no rating",
    "rating": "the judge rated the answer too high",
    "answer": "the answer is right",
    "unclear": "nobody can tell whether the answer is right",
    "perplexity": "the model hardly hesitated",
    "truth_length": "the truth is too long",
    "length_ratio": "truth and answer differ too much in length",
    "edit_distance": "the answer is too close to the truth",
    "no_wrong_answer": "no wrong answer to draw",
    "not_drawn": "over the number of pairs asked for",
}


@dataclass(frozen=True, kw_only=True)
class PairExample:
    """One preference pair as shown."""

    question: str
    chosen: str
    rejected: str
    ratio: float | None
    cells: list[Cell]
    columns: int
    width: str


def selection(page: PageInputs) -> dict[str, Any]:
    """What each rule dropped, and what was kept."""
    return {"selection": _selection_table(page.run), "selection_text": _selection_text(page.run)}


def ratios(page: PageInputs) -> dict[str, Any]:
    """Histograms of the attention ratios that selection looked at."""
    return {"ratios": _ratio_plots(page.run), "ratios_caption": _ratios_caption(page.run, page.heat)}


def selected_pairs(page: PageInputs) -> dict[str, Any]:
    """Pairs that selection made, by format."""
    return {"pairs": _pair_groups(page.run, page.pairs), "note": _no_pairs(page.run)}


def _no_pairs(contents: RunContents) -> str:
    if contents.pairs is None:
        return "No pairs yet: select/pairs.jsonl is missing. Run `mmdpo select`, then `mmdpo report`."
    return f"No pairs to show: selection kept none of {len(contents.dropped):,} answers. Its table says which rules dropped them."


def _selection_table(contents: RunContents) -> Table | None:
    """Dropped by each rule, and kept, by format. A dropped record counts at the first rule it failed; the last column has all."""
    if contents.pairs is None:
        return None
    pairs = Counter(record["format"] for record in contents.pairs)
    first = Counter((record["rule"], record["format"]) for record in contents.dropped)
    failed = Counter(rule for record in contents.dropped for rule in record.get("rules", [record["rule"]]))
    # With formats of which nothing came here.
    wanted = (contents.summaries.get("augment", {}).get("prompts") or {}).keys() | contents.summaries.get("select", {}).get(
        "pairs", {}
    ).keys()
    formats = list(by_format([*contents.pairs, *contents.dropped, *({"format": name} for name in wanted)]))
    rules = [*(rule for rule in RULES if rule in failed), *sorted(failed.keys() - set(RULES))]

    def row(name: str, counts: Sequence[int], last: str = "") -> list[str]:
        return [name, *(f"{n:,}" for n in counts), f"{sum(counts):,}", last]

    rows = [row("Answers", [pairs[f] + sum(first[rule, f] for rule in rules) for f in formats])]
    for rule in rules:
        name = f"{rule}: {RULE_WORDS[rule]}" if rule in RULE_WORDS else rule
        rows.append(row(name, [first[rule, f] for f in formats], f"{failed[rule]:,}"))
    rows.append(row("Pairs selected", [pairs[f] for f in formats]))
    return Table(
        caption="Answers dropped, by the first rule each failed and by format; last column: answers that fail the rule at all.",
        head=["Rule", *(label_of(format) for format in formats), "All", "Failing"],
        rows=rows,
        total=True,
    )


def _ratio_plots(contents: RunContents) -> list[str]:
    """One histogram a format, answers split by right and wrong where that is known, thresholds marked."""
    drawn: list[str] = []
    thresholds, match = contents.thresholds(), contents.selection_match
    for format, records in by_format(r for r in contents.scores if r.get("ratio") is not None).items():
        groups: dict[str, list[float]] = {"wrong": [], "right": [], "unclear": [], "answers": []}
        for record in records:
            groups[verdict(record, match)].append(float(record["ratio"]))
        groups = {name: ratios for name, ratios in groups.items() if ratios}
        used = {int(r["num_images"]) for r in records if r.get("num_images")}
        marks = {n: t for n, t in sorted(thresholds.get(format, {}).items()) if n in used}
        drawn.append(plots.ratio_histogram(groups, marks, name=f"ratio-{len(drawn)}", title=label_of(format)))
    return drawn


def _pair_groups(contents: RunContents, count: int) -> list[Group]:
    """Pairs spread over those of each format, about `count` in all."""
    groups = by_format(contents.pairs or ())
    each = -(-count // len(groups)) if groups else 0
    folder = contents.folder / "select"
    return [
        Group(label=label_of(name), examples=[_pair(r, folder) for r in spread(records, each)])
        for name, records in groups.items()
    ]


def _pair(record: Record, folder: Path) -> PairExample:
    cells, columns, width = image_cells(record, folder)
    return PairExample(
        question=question_of(record["prompt"]),
        chosen=text_of(record["chosen"]),
        rejected=text_of(record["rejected"]),
        ratio=record.get("ratio"),
        cells=cells,
        columns=columns,
        width=width,
    )


def _selection_text(contents: RunContents) -> str:
    pairs = contents.pairs or []
    compared = f" Answers were compared with the truth by: {contents.selection_match}." if "select" in contents.summaries else ""
    answers = len(pairs) + len(contents.dropped)
    dropped = " No answer was dropped." if answers and not contents.dropped else ""
    return f"{len(pairs):,} pairs selected from {answers:,} answers.{dropped}{compared}"


def _ratios_caption(contents: RunContents, heat: HeatMaps | None) -> str:
    where = "" if heat is None else f", decoder layer {heat.layer}"
    marks = " Dashed: the threshold for n pictures; answers to its left may be selected." if contents.thresholds() else ""
    return f"Share of each answer's attention on pictures that falls on the asked-about one{where}.{marks}"
