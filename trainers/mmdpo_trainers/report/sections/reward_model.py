"""A reward model on held-out pairs: how often the chosen response has the higher reward, by how much, and how far margins can be believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.methods.held_out import ALL

from .. import plots
from ..comparison import PageInputs
from ..intervals import Outcomes, Proportion, paired_change, paired_difference
from ..numbers import percent
from ..tables import Table, TableCell, change, mean, measured, share

UNTRAINED = "untrained head"


def reward_accuracy(page: PageInputs) -> dict[str, Any]:
    """Accuracy by kind of pair, of the untrained head and of every arm."""
    found = _by_arm(page)
    kinds = list(dict.fromkeys(kind for figures in found.values() for kind in figures))
    if not found:
        return {"headline": "", "table": None, "differences": None}
    margins = {arm: _margins(page, folder) for arm, folder in _folders(page).items() if arm in found}
    rows: list[list[TableCell]] = [
        [arm, *(share(_right(figures.get(kind))) for kind in kinds), mean(margins[arm][ALL].values(), "+.2f")]
        for arm, figures in found.items()
    ]
    pairs = max(figures[ALL]["pairs"] for figures in found.values())
    heads = ["all" if kind == ALL else kind.replace("/", ": ") for kind in kinds]
    return {
        "headline": _headline(page, found),
        "table": Table(
            caption=f"Share of {pairs:,} held-out pairs whose chosen response has the higher reward, with 95 % Wilson intervals; chance is "
            "50 %. Margin: chosen minus rejected reward, mean over all pairs with its 95 % interval.",
            head=["Model", *heads, "Margin"],
            rows=rows,
        ),
        "differences": _differences(page, kinds, heads, margins),
    }


def reward_margins(page: PageInputs) -> dict[str, Any] | None:
    """Margins and calibration of the main arm's reward model; None before it is evaluated."""
    figures = _by_arm(page).get(page.method.title)
    if figures is None:
        return None
    whole = figures[ALL]
    rows: list[list[TableCell]] = [
        [
            f"{percent(each['low'])} to {percent(each['high'])}",
            f"{each['pairs']:,}",
            percent(each["predicted"]),
            share(_right(each)),
        ]
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


def _folders(page: PageInputs) -> dict[str, str]:
    """Name for readers -> the folder of its evaluation."""
    folders = {UNTRAINED: "evaluate/before", page.method.title: "evaluate/after"}
    arms = [name.split("/")[1] for name in page.run.summaries if name.startswith("arms/") and name.endswith("/evaluate/after")]
    return folders | {page.method.name_of(arm): f"arms/{arm}/evaluate/after" for arm in arms}


def _by_arm(page: PageInputs) -> dict[str, Mapping[str, Any]]:
    """Name for readers -> figures by kind, of the untrained head and of the arms that have been evaluated."""
    found = {name: (page.run.summaries.get(folder) or {}).get("rewards") for name, folder in _folders(page).items()}
    return {name: figures for name, figures in found.items() if figures}


def _margins(page: PageInputs, folder: str) -> dict[str, dict[str, float]]:
    """Kind of pair, as the figures count them, -> id -> chosen minus rejected reward."""
    found: dict[str, dict[str, float]] = {ALL: {}}
    for record in read_jsonl(page.run.folder / folder / "rewards.jsonl"):
        for kind in (ALL, str(record.get("group") or record.get("kind") or ALL)):
            found.setdefault(kind, {})[str(record["id"])] = float(record["rewards"]["chosen"] - record["rewards"]["rejected"])
    return found


def _differences(
    page: PageInputs, kinds: Sequence[str], heads: Sequence[str], margins: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> Table | None:
    """How much the main arm differs from each other on the same pairs; None where it is not evaluated."""
    main = margins.get(page.method.title)
    if main is None:
        return None
    rows: list[list[TableCell]] = [
        [
            name,
            *(change(paired_change(_higher(theirs.get(kind, {})), _higher(main.get(kind, {})))) for kind in kinds),
            measured(paired_difference(theirs[ALL], main[ALL]), "+.2f"),
        ]
        for name, theirs in margins.items()
        if theirs is not main
    ]
    return Table(
        caption=f"{page.method.title} minus each other model on the same pairs, with 95 % intervals paired by pair: shares in points, and "
        "the margin. Where an interval holds 0, these pairs do not tell the two apart.",
        head=[f"{page.method.title} minus", *heads, "Margin"],
        rows=rows,
    )


def _higher(margins: Mapping[str, float]) -> Outcomes:
    return {name: margin > 0 for name, margin in margins.items()}


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
