"""Accuracy before and after training, by format, and of control arms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmdpo_trainers.methods import Method

from .. import plots
from ..comparison import PageInputs
from ..contents import Record, RunContents, by_format, label_of, proportion
from ..intervals import Proportion
from ..tables import Table, percent, points


def accuracy(page: PageInputs) -> dict[str, Any]:
    """Accuracy by format, before and after, with the attention ratio on the target."""
    contents = page.run
    formats = [row for row in contents.accuracy_rows(nested=False) if row.questions]
    rows = contents.accuracy_rows(nested=True)
    return {
        "accuracy": formats,
        "accuracy_rows": rows,
        "by_images": any(row.nested for row in rows),
        "has_ratio": any(row.ratio_before is not None or row.ratio_after is not None for row in rows),
        "accuracy_plot": plots.accuracy_plot([(row.label, row.before, row.after) for row in formats]) if formats else "",
        "headline": _headline(contents),
        "match": contents.evaluation_match,
    }


def _headline(contents: RunContents) -> str:
    single = next((row for row in contents.accuracy_rows(nested=False) if row.label == label_of("single")), None)
    sentences = []
    parts = [("Multi-image accuracy, averaged over formats", *contents.multi_image_mean())]
    if single is not None:
        before, after = (p.value if p else None for p in (single.before, single.after))
        parts.append(("Single-image accuracy", before, after))
    for name, before, after in parts:
        if before is not None and after is not None:
            change = f"{points(after - before)} points"
            sentences.append(f"{name}: {percent(before)} before training, {percent(after)} after ({change}).")
        elif (only := before if after is None else after) is not None:
            sentences.append(f"{name}: {percent(only)} {'before' if after is None else 'after'} training.")
    return " ".join(sentences)


def control_arms(page: PageInputs) -> dict[str, Any]:
    """Accuracy by format of every arm."""
    return {"table": _arms_table(page.run, page.method)}


def _arms_table(contents: RunContents, method: Method) -> Table | None:
    """Accuracy by format of the main arm, of no training, and of each control arm; None where there are no arms."""
    if not contents.arms:
        return None
    main_pairs = len(contents.pairs) if contents.pairs is not None else None
    rows: list[tuple[str, list[Record], int | None]] = [
        ("no training", contents.before, None),
        ("this run", contents.after, main_pairs),
        *((method.name_of(name), answers, pairs) for name, (answers, pairs) in contents.arms.items()),
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
