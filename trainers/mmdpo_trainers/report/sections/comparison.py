"""Arms side by side: accuracy by group of questions, and what pictures are worth to each model on held-out pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmdpo_trainers.methods import Method
from mmdpo_trainers.methods.held_out import ALL, BASE, CORRUPTIONS, over_seeds

from .. import plots
from ..comparison import Comparison, PageInputs, group_of
from ..contents import Record, outcomes, proportion
from ..held_out import HeldOut
from ..intervals import paired_change
from ..numbers import NONE, number, percent
from ..tables import Table, TableCell, change, in_words, mean, measured, share


def comparison(page: PageInputs) -> dict[str, Any]:
    """Accuracy and held-out figures of every arm."""
    compared, name_of = page.comparison, page.method.name_of
    held_out = compared.held_out
    return {
        "headline": _headline(compared, page.method),
        "accuracy": _accuracy_table(page),
        "plots": _arm_plots(compared, name_of),
        "held_out": [table for kind in held_out.kinds() if (table := _held_out_table(held_out, kind, name_of))],
        "differences": _differences_table(page),
        "base": BASE,
    }


def seeds(page: PageInputs) -> dict[str, Any] | None:
    """Mean and range over runs with other seeds; None where there are none."""
    if not page.seeds:
        return None
    compared = page.comparison
    return {"seeds": _seeds_table([compared.summary, *page.seeds], compared.held_out.kinds(), page.method.name_of)}


def _headline(compared: Comparison, method: Method) -> str:
    sentences = []
    figures, held_out, other_arm = compared.figures, compared.held_out, method.baseline or ""
    base, main, other = (figures.get(arm, {}) for arm in (BASE, method.name, other_arm))
    name, its_name = method.title, method.name_of(other_arm)
    for group, after in sorted((main.get("accuracy") or {}).items()):
        before = (base.get("accuracy") or {}).get(group)
        if before is not None and group.endswith("disagree"):
            beside = f", {percent(other['accuracy'][group])} after {its_name}" if other.get("accuracy") else ""
            what = group.replace("/", "s, pictures that ")
            sentences.append(f"{what}: {percent(before)} right before training, {percent(after)} after {name}{beside}.")
    gaps = [held_out.gap(arm, ALL, "crop") for arm in (method.name, other_arm)]
    difference = held_out.gap_difference(other_arm, method.name, ALL, "crop")
    if gaps[0] and gaps[1] and difference:
        values = [number(gap.value, ".2f") for gap in gaps if gap]
        sentences.append(
            f"Gap between true and cropped picture: {values[0]} nats after {name}, {values[1]} after {its_name} "
            f"(difference {in_words(measured(difference, '+.2f'))})."
        )
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


def _groups(compared: Comparison) -> list[str]:
    return sorted({group_of(answer) for answers in compared.answers.values() for answer in answers.values()})


def _of_group(compared: Comparison, arm: str, group: str) -> list[Record]:
    return [answer for answer in compared.answers.get(arm, {}).values() if group_of(answer) == group]


def _accuracy_table(page: PageInputs) -> Table | None:
    compared = page.comparison
    groups = _groups(compared)
    if not groups:
        return None
    return Table(
        caption="Share of questions answered right, with 95 % Wilson intervals; the same questions for every arm."
        + (f" Answers were compared with the truth by: {match}." if (match := page.run.evaluation_match) else ""),
        head=["Arm", *(group.replace("/", ": ") for group in groups)],
        rows=[
            [page.method.name_of(arm), *(share(proportion(_of_group(compared, arm, group))) for group in groups)]
            for arm in compared.answers
        ],
    )


def _held_out_table(held_out: HeldOut, kind: str, name_of: Callable[[str], str]) -> Table | None:
    rows: list[list[TableCell]] = []
    for arm in held_out.pairs:
        chosen = held_out.chosen(arm, kind)
        if chosen:
            cells = [mean(held_out.gaps(arm, kind, name).values(), ".2f") for name in CORRUPTIONS]
            cells += [mean(held_out.rewards(arm, kind, side).values(), "+.3f") for side in ("chosen", "rejected")]
            cells += [mean(chosen.values(), ".2f"), share(held_out.preferred(arm, kind))]
            rows.append([name_of(arm), *cells])
    if not rows:
        return None
    pairs = max(len(held_out.chosen(arm, kind)) for arm in held_out.pairs)
    what = "All held-out pairs" if kind == ALL else f"Held-out pairs of kind {kind}"
    return Table(
        caption=f"{what} ({pairs:,}), means with 95 % intervals. Gap: log p(chosen | picture) − log p(chosen | corrupted picture), in nats.",
        head=["Arm", *(f"Gap, {name}" for name in CORRUPTIONS), "Chosen reward", "Rejected reward", "log p(chosen)", "Chosen likelier"],
        rows=rows,
    )  # fmt: skip


def _differences_table(page: PageInputs) -> Table | None:
    """How much the main arm differs from each other on the same questions and pairs; None where it is not evaluated, or alone."""
    compared, main, name_of = page.comparison, page.method.name, page.method.name_of
    held_out, groups = compared.held_out, _groups(compared)
    others = [arm for arm in dict.fromkeys((*compared.answers, *held_out.pairs)) if arm != main]
    if not others or (main not in compared.answers and main not in held_out.pairs):
        return None
    mine = {group: outcomes(_of_group(compared, main, group)) for group in groups}
    kinds = [kind for kind in held_out.kinds() if kind != ALL] or [ALL]
    rows: list[list[TableCell]] = []
    for arm in others:
        cells = [change(paired_change(outcomes(_of_group(compared, arm, group)), mine[group])) for group in groups]
        gaps = (
            [held_out.gap_difference(arm, main, kind, name) for name in CORRUPTIONS for kind in kinds] if held_out.pairs else []
        )
        rows.append([name_of(arm), *cells, *(measured(gap, "+.2f") for gap in gaps)])
    heads = [f"{name} gap" + ("" if kind == ALL else f", {kind}") for name in CORRUPTIONS for kind in kinds]
    return Table(
        caption=f"{name_of(main)} minus each other arm on the same questions and pairs, with 95 % intervals paired by question or pair: "
        "accuracy in points, gaps in nats. Where an interval holds 0, these records do not tell the two apart.",
        head=[f"{name_of(main)} minus", *(group.replace("/", ": ") for group in groups), *(heads if held_out.pairs else [])],
        rows=rows,
    )


def _arm_plots(compared: Comparison, name_of: Callable[[str], str]) -> list[str]:
    held_out, arms = compared.held_out, list(compared.figures)
    names, drawn = [name_of(arm) for arm in arms], []
    shares = {
        group.removesuffix("/disagree"): [proportion(_of_group(compared, arm, group)) for arm in arms]
        for group in _groups(compared)
        if group.endswith("disagree")
    }
    if shares:
        drawn.append(
            plots.dot_plot(names, shares, name="disagree", title="Where picture and prior disagree", xlabel="accuracy, %")
        )
    kinds = [kind for kind in held_out.kinds() if kind != ALL] or [ALL]
    for name in CORRUPTIONS if held_out.pairs else ():
        gaps = {kind: [held_out.gap(arm, kind, name) for arm in arms] for kind in kinds}
        if any(value is not None for values in gaps.values() for value in values):
            title = f"Gap between true picture and {name}"
            drawn.append(plots.dot_plot(names, gaps, name=f"gap-{name}", title=title, xlabel="nats"))
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
        return NONE
    return f"{number(sum(values) / len(values), '.2f')} ({number(min(values), '.2f')} to {number(max(values), '.2f')})"
