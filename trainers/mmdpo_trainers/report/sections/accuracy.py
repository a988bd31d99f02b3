"""Accuracy before and after training, by format, and of control arms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmdpo_trainers.methods import Method

from .. import plots
from ..comparison import PageInputs
from ..contents import (
    MULTI_IMAGE,
    AccuracyRow,
    Record,
    RunContents,
    by_format,
    label_of,
    multi_image_difference,
    outcomes,
    proportion,
)
from ..intervals import paired_change
from ..numbers import percent, ratio
from ..tables import Table, TableCell, change, in_words, share


def accuracy(page: PageInputs) -> dict[str, Any]:
    """Accuracy by format, before and after, with the attention ratio on the target."""
    contents = page.run
    formats = [row for row in contents.accuracy_rows(nested=False) if row.questions]
    rows = contents.accuracy_rows(nested=True)
    has_ratio = any(row.ratio_before is not None or row.ratio_after is not None for row in rows)
    return {
        "accuracy": formats,
        "table": _accuracy_table(rows, has_ratio),
        "has_ratio": has_ratio,
        "accuracy_plot": plots.accuracy_plot([(row.label, row.before, row.after) for row in formats]) if formats else "",
        "headline": _headline(contents),
        "match": contents.evaluation_match,
    }


def _accuracy_table(rows: Sequence[AccuracyRow], has_ratio: bool) -> Table:
    nested = {number for number, row in enumerate(rows) if row.nested}
    return Table(
        caption="Accuracy with 95 % Wilson intervals; the change, in points, with a 95 % interval paired by question."
        + (" Rows under a format: by number of pictures." if nested else ""),
        head=[
            "Format",
            "Questions",
            "Before",
            "After",
            "Change",
            *(["Target ratio before", "Target ratio after"] if has_ratio else []),
        ],
        rows=[
            [row.label, f"{row.questions:,}", share(row.before), share(row.after), change(row.change)]
            + ([ratio(row.ratio_before), ratio(row.ratio_after)] if has_ratio else [])
            for row in rows
        ],
        nested=nested,
    )


def _headline(contents: RunContents) -> str:
    single = next((row for row in contents.accuracy_rows(nested=False) if row.label == label_of("single")), None)
    sentences = []
    whole = multi_image_difference(contents.before, contents.after)
    parts = [("Multi-image accuracy, averaged over formats", *contents.multi_image_mean(), whole)]
    if single is not None:
        before, after = (p.value if p else None for p in (single.before, single.after))
        parts.append(("Single-image accuracy", before, after, single.change))
    for name, before, after, difference in parts:
        if before is not None and after is not None:
            beside = "" if difference is None else f" ({in_words(change(difference), ' points')})"
            sentences.append(f"{name}: {percent(before)} before training, {percent(after)} after{beside}.")
        elif (only := before if after is None else after) is not None:
            sentences.append(f"{name}: {percent(only)} {'before' if after is None else 'after'} training.")
    return " ".join(sentences)


def control_arms(page: PageInputs) -> dict[str, Any]:
    """Accuracy by format of every arm, and how much better the run itself is than each."""
    arms = _arms(page.run, page.method) if page.run.arms else []
    return {"table": _arms_table(arms) if arms else None, "differences": _differences_table(arms)}


Arm = tuple[str, list[Record], int | None]
"""Name, answers, number of pairs."""
_THIS = "this run"


def _arms(contents: RunContents, method: Method) -> list[Arm]:
    """No training, the main arm, and each control arm, as far as they have answers."""
    main_pairs = len(contents.pairs) if contents.pairs is not None else None
    arms: list[Arm] = [
        ("no training", contents.before, None),
        (_THIS, contents.after, main_pairs),
        *((method.name_of(name), answers, pairs) for name, (answers, pairs) in contents.arms.items()),
    ]
    return [arm for arm in arms if arm[1]]


def _arms_table(arms: Sequence[Arm]) -> Table:
    """Accuracy by format of every arm."""
    formats = list(by_format(record for _, answers, _ in arms for record in answers))
    return Table(
        caption="Accuracy on the same questions, with 95 % Wilson intervals. Every arm starts from the same model.",
        head=["Arm", *(label_of(format) for format in formats), "Pairs"],
        rows=[[name, *_accuracies(answers, formats), "–" if n is None else f"{n:,}"] for name, answers, n in arms],
    )


def _accuracies(answers: Sequence[Record], formats: Sequence[str]) -> list[TableCell]:
    groups = by_format(answers)
    return [share(proportion(groups.get(format, []))) for format in formats]


def _differences_table(arms: Sequence[Arm]) -> Table | None:
    """How much better the main arm is than each other; None where it or all others are missing."""
    main = next((answers for name, answers, _ in arms if name == _THIS), None)
    others = [(name, answers) for name, answers, _ in arms if name != _THIS]
    if main is None or not others:
        return None
    mine = by_format(main)
    several = sum(name in MULTI_IMAGE for name in mine) > 1
    rows: list[list[TableCell]] = []
    for name, answers in others:
        theirs = by_format(answers)
        cells = [change(paired_change(outcomes(theirs.get(format, ())), outcomes(mine[format]))) for format in mine]
        rows.append([name, *cells, *([change(multi_image_difference(answers, main))] if several else [])])
    return Table(
        caption="Accuracy of this run minus that of each other arm, in points, with 95 % intervals paired by question: where an interval "
        "holds 0, these questions do not tell the two apart.",
        head=["This run minus", *(label_of(format) for format in mine), *(["Several pictures, mean"] if several else [])],
        rows=rows,
    )
