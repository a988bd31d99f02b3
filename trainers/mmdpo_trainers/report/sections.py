"""The page's sections made from records: tables, plots and example pairs."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdpo_trainers.methods.selection import RULES

from . import plots
from .contents import Record, RunContents, by_format, label_of, proportion, spread, verdict
from .examples import Cell, picture_cells, question_of, text_of
from .intervals import Proportion

PACKAGES = ("mmdpo-kernels", "torch", "transformers", "peft", "accelerate", "datasets", "pillow", "matplotlib")
CURVES = (
    ("Loss", ("loss", "nll_loss", "eval_loss")),
    ("Rewards", ("rewards/chosen", "rewards/rejected", "eval_rewards/chosen", "eval_rewards/rejected")),
    ("Reward margin", ("rewards/margins", "eval_rewards/margins")),
    ("Reward accuracy", ("rewards/accuracies", "eval_rewards/accuracies")),
    ("Log-probabilities", ("logps/chosen", "logps/rejected")),
)
RULE_WORDS = {
    "no_truth": "the prompt has no true answer",
    "empty_response": "the model answered nothing",
    "no_threshold": "no threshold for this number of pictures",
    "no_ratio": "no attention ratio",
    "ratio": "enough attention on the target",
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
class Table:
    """A table of ready text and proportions; the first cell of a row is its heading. `total`: the last row is set apart."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | Proportion | None]]
    total: bool = False


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


@dataclass(frozen=True, kw_only=True)
class Group:
    """The examples of one format."""

    label: str
    examples: list[Any]


def percent(value: float | None) -> str:
    """A fraction as a percentage with one decimal; the space does not break."""
    return "–" if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def bare(value: float) -> str:
    """A fraction as a percentage without its sign, for the ends of an interval."""
    return f"{100 * value:.1f}"


def points(value: float | None) -> str:
    """A difference of fractions in signed percentage points."""
    if value is None:
        return "–"
    text = f"{100 * value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def selection_table(contents: RunContents) -> Table | None:
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
        head=["", *(label_of(format) for format in formats), "All", "Failing"],
        rows=rows,
        total=True,
    )


def ratio_plots(contents: RunContents) -> list[str]:
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


def curve_plots(log: Iterable[Record]) -> list[str]:
    """The training curves that the log holds: losses, rewards, and every `attn/ratio_*`."""
    records = [record for record in log if "step" in record]
    ratio_keys = sorted({key for record in records for key in record if key.removeprefix("eval_").startswith("attn/ratio_")})
    drawn: list[str] = []
    for title, keys in (*CURVES, ("Target attention ratio", tuple(ratio_keys))):
        series = {}
        for key in keys:
            values = {record["step"]: float(record[key]) for record in records if record.get(key) is not None}
            if values:
                label = re.sub(r"rewards/|logps/|attn/ratio_", "", key).replace("_", " ")
                series[label] = (sorted(values), [values[step] for step in sorted(values)])
        if series:
            drawn.append(plots.curve_plot(series, name=f"curve-{len(drawn)}", title=title))
    return drawn


def pair_groups(contents: RunContents, count: int) -> list[Group]:
    """Pairs spread over those of each format, about `count` in all."""
    groups = by_format(contents.pairs or ())
    each = -(-count // len(groups)) if groups else 0
    folder = contents.folder / "select"
    return [
        Group(label=label_of(name), examples=[_pair(r, folder) for r in spread(records, each)])
        for name, records in groups.items()
    ]


def _pair(record: Record, folder: Path) -> PairExample:
    cells, columns, width = picture_cells(record, folder)
    return PairExample(
        question=question_of(record["prompt"]),
        chosen=text_of(record["chosen"]),
        rejected=text_of(record["rejected"]),
        ratio=record.get("ratio"),
        cells=cells,
        columns=columns,
        width=width,
    )


def arms_table(contents: RunContents) -> Table | None:
    """Accuracy by format of the main arm, of no training, and of each control arm; None where there are no arms."""
    if not contents.arms:
        return None
    main_pairs = len(contents.pairs) if contents.pairs is not None else None
    rows: list[tuple[str, list[Record], int | None]] = [
        ("no training", contents.before, None),
        ("this run", contents.after, main_pairs),
        *((name.replace("_", " "), answers, pairs) for name, (answers, pairs) in contents.arms.items()),
    ]
    formats = list(by_format(record for _, answers, _ in rows for record in answers))
    return Table(
        caption="Accuracy on the same questions, with 95 % Wilson intervals. Every arm starts from the same model.",
        head=["Arm", *(label_of(format) for format in formats), "Pairs"],
        rows=[[name, *_accuracies(answers, formats), "–" if n is None else f"{n:,}"] for name, answers, n in rows if answers],
    )


def _accuracies(answers: Sequence[Record], formats: Sequence[str]) -> list[Proportion | None]:
    groups = by_format(answers)
    return [proportion(groups.get(format, [])) for format in formats]


def lost_table(contents: RunContents) -> Table | None:
    """Records left out, by stage and reason; None where there are none."""
    found = {"augment": contents.summaries.get("augment"), "evaluate": contents.evaluation_data, **contents.summaries}
    losses = {name: summary["lost"] for name, summary in found.items() if summary and summary.get("lost")}
    if not losses:
        return None
    rows = []
    for name, loss in losses.items():
        rows += [[name, reason.replace("_", " "), f"{count:,}"] for reason, count in loss["reasons"].items()]
        rows.append([name, "all records left out, of those read", f"{loss['records']:,} of {loss['of']:,}"])
    return Table(
        caption="Records that were left out, by stage and reason; a record may have several. Each is in the stage's problems.jsonl.",
        head=["Stage", "Reason", "Number"],
        rows=rows,
    )


def seconds_table(contents: RunContents) -> Table | None:
    """Wall seconds of each finished stage."""
    seconds = {name: float(s["seconds"]) for name, s in contents.summaries.items() if s.get("seconds") is not None}
    if not seconds:
        return None
    rows = [[name, f"{value:,.1f}"] for name, value in seconds.items()]
    rows.append(["All", f"{sum(seconds.values()):,.1f}"])
    return Table(caption="Wall time, interrupted attempts included.", head=["Stage", "Seconds"], rows=rows, total=True)


def versions_table() -> Table:
    """Python, the platform and the packages a result may depend on."""
    rows = [["Python", platform.python_version()], ["Platform", f"{platform.system()} {platform.machine()}"]]
    for package in PACKAGES:
        try:
            rows.append([package, importlib.metadata.version(package)])
        except importlib.metadata.PackageNotFoundError:
            continue
    return Table(caption="Versions", head=["", "Version"], rows=rows)
