"""At which layer, and in which heads, the attention ratio tells right answers from wrong ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdpo_trainers.answers.layer_choice import ALL, verdicts

from .. import plots
from ..comparison import PageInputs
from ..contents import label_of
from ..numbers import number, percent
from ..tables import Table


def layers(page: PageInputs) -> dict[str, Any]:
    """AUC by layer with intervals, by head, the layer gone by, and thresholds for it."""
    curves = page.run.layers
    if not curves or not curves["auc"]:
        return {"plot": "", "heads": "", "sentences": verdicts(curves) if curves else [], "thresholds": None, "gone_by": ""}
    return {
        "plot": plots.layer_plot(
            {_label(name): _points(curves, found) for name, found in curves["auc"].items()},
            {_label(name): layer for name, layer in curves["chosen"].items()},
            name="layers",
        ),
        "heads": plots.head_map(curves["heads"][ALL], curves["layers"], name="heads"),
        "sentences": verdicts(curves),
        "gone_by": _gone_by(curves),
        "thresholds": _thresholds(curves),
    }


def _label(name: str) -> str:
    return "All formats" if name == ALL else label_of(name)


def _points(curves: Mapping[str, Any], found: list[dict[str, Any] | None]) -> list[tuple[int, float, float, float]]:
    return [
        (layer, each["value"], each["low"], each["high"])
        for layer, each in zip(curves["layers"], found, strict=True)
        if each is not None
    ]


def _gone_by(curves: Mapping[str, Any]) -> str:
    used = {_label(name): layer for name, layer in curves["chosen"].items()}
    if len(set(used.values())) == 1:
        return f"The ratios of this run are those of layer {next(iter(used.values()))}."
    return "The ratios of this run are those of " + ", ".join(
        f"layer {layer} ({label.lower()})" for label, layer in used.items() if label != _label(ALL)
    )


def _thresholds(curves: Mapping[str, Any]) -> Table | None:
    rows = [
        [
            f"{_label(name)}, {count} pictures",
            number(each["threshold"], ".2f"),
            *(percent(each[key]) for key in ("wrong_under", "wrong", "found")),
        ]
        for name, table in curves["thresholds"].items()
        for count, each in table.items()
    ]
    if not rows:
        return None
    return Table(
        caption="Thresholds that part right from wrong answers best at that layer (Youden's), chosen on one half of the answers and measured on "
        "the other: of the answers under the threshold, and of all, how many are wrong; and how many of the wrong ones are under it.",
        head=["Format and pictures", "Threshold", "Wrong under it", "Wrong of all", "Wrong ones found"],
        rows=rows,
    )
