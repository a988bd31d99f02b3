"""Arms side by side: accuracy by group of questions, and what pictures are worth to each model on held-out pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmdpo_trainers.methods import Method
from mmdpo_trainers.methods.held_out import BASE, CORRUPTIONS, over_seeds

from .. import plots
from ..comparison import ALL, Comparison, PageInputs, group_of, kinds_of
from ..contents import proportion
from ..intervals import Proportion
from ..tables import Table, percent


def comparison(page: PageInputs) -> dict[str, Any]:
    """Accuracy and held-out figures of every arm."""
    compared, name_of = page.comparison, page.method.name_of
    figures = compared.figures
    kinds = kinds_of(figures.values())
    return {
        "headline": _headline(figures, page.method),
        "accuracy": _accuracy_table(page),
        "plots": _arm_plots(compared, kinds, name_of),
        "held_out": [table for kind in kinds if (table := _held_out_table(figures, kind, name_of))],
        "base": BASE,
    }


def seeds(page: PageInputs) -> dict[str, Any] | None:
    """Mean and range over runs with other seeds; None where there are none."""
    if not page.seeds:
        return None
    compared = page.comparison
    kinds = kinds_of(compared.figures.values())
    return {"seeds": _seeds_table([compared.summary, *page.seeds], kinds, page.method.name_of)}


def _headline(figures: Mapping[str, Mapping[str, Any]], method: Method) -> str:
    sentences = []
    base, main, other = (figures.get(arm or "", {}) for arm in (BASE, method.name, method.baseline))
    name, its_name = method.title, method.name_of(method.baseline or "")
    for group, after in sorted((main.get("accuracy") or {}).items()):
        before = (base.get("accuracy") or {}).get(group)
        if before is not None and group.endswith("disagree"):
            beside = f", {percent(other['accuracy'][group])} after {its_name}" if other.get("accuracy") else ""
            what = group.replace("/", "s, pictures that ")
            sentences.append(f"{what}: {percent(before)} right before training, {percent(after)} after {name}{beside}.")
    if main.get("held_out") and other.get("held_out"):
        gaps = [each["held_out"][ALL]["gap"]["crop"] for each in (main, other)]
        times = f" ({gaps[0] / gaps[1]:.1f} times)" if gaps[1] > 0 else ""
        sentences.append(
            f"Gap between true and cropped picture: {gaps[0]:.2f} nats after {name}, {gaps[1]:.2f} after {its_name}{times}."
        )
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


def _accuracy_table(page: PageInputs) -> Table | None:
    contents, name_of = page.comparison, page.method.name_of
    groups = sorted({group_of(answer) for answers in contents.answers.values() for answer in answers.values()})
    if not groups:
        return None
    rows: list[list[str | Proportion | None]] = [
        [name_of(arm), *(proportion([a for a in answers.values() if group_of(a) == group]) for group in groups)]
        for arm, answers in contents.answers.items()
    ]
    return Table(
        caption="Share of questions answered right, with 95 % Wilson intervals; the same questions for every arm."
        + (f" Answers were compared with the truth by: {match}." if (match := page.run.evaluation_match) else ""),
        head=["Arm", *(group.replace("/", ": ") for group in groups)],
        rows=rows,
    )


def _held_out_table(figures: Mapping[str, Mapping[str, Any]], kind: str, name_of: Callable[[str], str]) -> Table | None:
    found = {arm: each["held_out"][kind] for arm, each in figures.items() if kind in (each.get("held_out") or {})}
    if not found:
        return None
    rows = []
    for arm, each in found.items():
        rewards = each.get("rewards") or {}
        cells = [f"{each['gap'][name]:.2f}" for name in CORRUPTIONS]
        cells += [_signed(rewards.get(name)) for name in ("chosen", "rejected")]
        rows.append([name_of(arm), *cells, f"{each['logps']['chosen']:.2f}".replace("-", "−"), percent(each["preferred"])])
    pairs = max(each["pairs"] for each in found.values())
    what = "All held-out pairs" if kind == ALL else f"Held-out pairs of kind {kind}"
    return Table(
        caption=f"{what} ({pairs}). Gap: log p(chosen | picture) − log p(chosen | corrupted picture), in nats.",
        head=["Arm", *(f"Gap, {name}" for name in CORRUPTIONS), "Chosen reward", "Rejected reward", "log p(chosen)", "Chosen likelier"],
        rows=rows,
    )  # fmt: skip


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def _arm_plots(contents: Comparison, kinds: Sequence[str], name_of: Callable[[str], str]) -> list[str]:
    figures = contents.figures
    arms = list(figures)
    drawn = []
    groups = sorted(
        {group_of(a) for answers in contents.answers.values() for a in answers.values() if group_of(a).endswith("disagree")}
    )
    shares = {
        group.removesuffix("/disagree"): [
            proportion([a for a in contents.answers.get(arm, {}).values() if group_of(a) == group]) for arm in arms
        ]
        for group in groups
    }
    if shares:
        title = "Where picture and prior disagree"
        drawn.append(plots.dot_plot([name_of(arm) for arm in arms], shares, name="disagree", title=title, xlabel="accuracy, %"))
    for name in CORRUPTIONS:
        gaps = {
            kind: [((figures[arm].get("held_out") or {}).get(kind) or {}).get("gap", {}).get(name) for arm in arms]
            for kind in kinds
            if kind != ALL or len(kinds) == 1
        }
        if any(value is not None for values in gaps.values() for value in values):
            title = f"Gap between true picture and {name}"
            drawn.append(plots.dot_plot([name_of(arm) for arm in arms], gaps, name=f"gap-{name}", title=title, xlabel="nats"))
    return drawn


def _seeds_table(summaries: Sequence[Mapping[str, Any]], kinds: Sequence[str], name_of: Callable[[str], str]) -> Table:
    """Mean and range of each figure over runs with different seeds."""
    values = over_seeds(summaries)
    columns = sorted({name for arm in values.values() for name in arm})
    wanted = [name for name in columns if name.startswith("accuracy/") and name.endswith("disagree")]
    wanted += [
        f"{what}/{kind}/{name}" for kind in kinds for what, name in (("gap", "crop"), ("gap", "blank"), ("reward", "chosen"))
    ]
    wanted = [name for name in wanted if name in columns]
    rows = [[name_of(arm), *(_mean_and_range(found.get(name, [])) for name in wanted)] for arm, found in values.items()]
    return Table(
        caption=f"Mean over {len(summaries)} seeds, smallest to largest in brackets.",
        head=["Arm", *(name.replace("/", " ") for name in wanted)],
        rows=rows,
    )


def _mean_and_range(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})".replace("-", "−")
