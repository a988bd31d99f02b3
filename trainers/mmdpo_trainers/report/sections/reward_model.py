"""A reward model on held-out pairs: how often the chosen response has the higher reward, by how much, and how far margins can be believed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdpo_trainers.methods.held_out import ALL

from .. import plots
from ..comparison import PageInputs
from ..intervals import Proportion
from ..tables import Table, percent

UNTRAINED = "untrained head"


def reward_accuracy(page: PageInputs) -> dict[str, Any]:
    """Accuracy by kind of pair, of the untrained head and of every arm."""
    found = _by_arm(page)
    kinds = list(dict.fromkeys(kind for figures in found.values() for kind in figures))
    if not found:
        return {"headline": "", "table": None}
    rows: list[list[str | Proportion | None]] = [
        [arm, *(_right(figures.get(kind)) for kind in kinds), f"{figures[ALL]['margin']:+.2f}".replace("-", "−")]
        for arm, figures in found.items()
    ]
    pairs = max(figures[ALL]["pairs"] for figures in found.values())
    heads = ["all" if kind == ALL else kind.replace("/", ": ") for kind in kinds]
    return {
        "headline": _headline(page, found),
        "table": Table(
            caption=f"Share of {pairs:,} held-out pairs whose chosen response has the higher reward, with 95 % Wilson intervals; chance is "
            "50 %. Margin: chosen minus rejected reward, mean over all pairs.",
            head=["Model", *heads, "Margin"],
            rows=rows,
        ),
    }


def reward_margins(page: PageInputs) -> dict[str, Any] | None:
    """Margins and calibration of the main arm's reward model; None before it is evaluated."""
    figures = _by_arm(page).get(page.method.title)
    if figures is None:
        return None
    whole = figures[ALL]
    rows: list[list[str | Proportion | None]] = [
        [f"{percent(each['low'])} to {percent(each['high'])}", f"{each['pairs']:,}", percent(each["predicted"]), _right(each)]
        for each in whole["calibration"]
    ]
    histogram = whole["histogram"]
    return {
        "plot": plots.bar_plot(
            histogram["edges"],
            histogram["counts"],
            name="margins",
            title="Margins of held-out pairs",
            xlabel="chosen − rejected reward",
        ),
        "table": Table(
            caption="Calibration: pairs by the probability that their margin gives the higher reward, sigmoid(|margin|), and how many of "
            "them are right.",
            head=["Probability", "Pairs", "Mean", "Right"],
            rows=rows,
        ),
    }


def _by_arm(page: PageInputs) -> dict[str, Mapping[str, Any]]:
    """Name for readers -> figures by kind, of the untrained head and of the arms that have been evaluated."""
    summaries, name_of = page.run.summaries, page.method.name_of
    folders = {UNTRAINED: "evaluate/before", page.method.title: "evaluate/after"}
    arms = [name.split("/")[1] for name in summaries if name.startswith("arms/") and name.endswith("/evaluate/after")]
    folders |= {name_of(arm): f"arms/{arm}/evaluate/after" for arm in arms}
    found = {name: (summaries.get(folder) or {}).get("rewards") for name, folder in folders.items()}
    return {name: figures for name, figures in found.items() if figures}


def _right(figures: Mapping[str, Any] | None) -> Proportion | None:
    return None if figures is None else Proportion(figures["right"], figures["pairs"])


def _headline(page: PageInputs, found: Mapping[str, Mapping[str, Any]]) -> str:
    main = found.get(page.method.title)
    if main is None:
        return ""
    others = {UNTRAINED: found.get(UNTRAINED)}
    if page.method.baseline is not None:
        name = page.method.name_of(page.method.baseline)
        others[name] = found.get(name)
    beside = ", ".join(f"{percent(each[ALL]['accuracy'])} {name}" for name, each in others.items() if each)
    return f"Chosen response rewarded higher: {percent(main[ALL]['accuracy'])} of held-out pairs" + (
        f" ({beside})." if beside else "."
    )
