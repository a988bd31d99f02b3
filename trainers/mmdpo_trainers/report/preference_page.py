"""The page of an mDPO run: arms side by side, rewards over training, and what pictures are worth to each model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from mmdpo_trainers.data.corruption import Corruption, corrupt
from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.methods.held_out import ALL, BASE, CORRUPTIONS, MAIN, over_seeds, preference_summary

from . import plots, sections
from .contents import Record, RunContents, proportion, spread
from .examples import Cell, picture_of, question_of, text_of
from .intervals import Proportion
from .page import common, fill
from .pictures import data_uri, sized

NAMES = {
    MAIN: "mDPO",
    "dpo": "DPO",
    "dpo_no_image": "DPO (No Image)",
    "mdpo_without_copo": "mDPO without CoPO",
    "mdpo_without_ancpo": "mDPO without AncPO",
}
"""Arms as readers know them; any other arm is its own name."""


def name_of(arm: str) -> str:
    """An arm's name for readers."""
    return NAMES.get(arm, arm.replace("_", " "))


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question with its picture, corrupted versions of it, and the answers by arm as (arm, answer, right)."""

    question: str
    truth: str
    cells: list[Cell]
    answers: list[tuple[str, str, bool]]


@dataclass(frozen=True, kw_only=True)
class PreferenceContents:
    """What the files of an mDPO run say: its figures, and the answers of the base ("no training") and of each arm by question id."""

    run: RunContents
    summary: Mapping[str, Any]
    answers: Mapping[str, Mapping[str, Record]]

    @classmethod
    def read(cls, folder: Path) -> PreferenceContents:
        """Read a run folder leniently: what is not there yet is left out."""
        run = RunContents.read(folder)
        arms = [path.name for path in sorted((folder / "arms").glob("*")) if path.is_dir()]
        # Arms of the configuration come in its order, which the run's own summary keeps.
        known = list(read_json(folder / "summary.json").get("arms", ())) if (folder / "summary.json").is_file() else []
        arms = sorted(arms, key=lambda arm: (known.index(arm) if arm in known else len(known), arm))
        answers = {BASE: _by_id(run.before), MAIN: _by_id(run.after)}
        answers |= {arm: _by_id(run.arms[arm][0]) for arm in arms if arm in run.arms}
        return cls(run=run, summary=preference_summary(folder, arms), answers={arm: a for arm, a in answers.items() if a})

    @property
    def figures(self) -> dict[str, Mapping[str, Any]]:
        """Base and arms that have been evaluated -> their figures."""
        found = {BASE: self.summary["before"], **self.summary["arms"]}
        return {arm: figures for arm, figures in found.items() if figures.get("held_out") or figures.get("accuracy")}


def render_preferences(
    contents: PreferenceContents,
    *,
    title: str,
    config: Mapping[str, Any],
    pairs: int = 6,
    seeds: Sequence[Mapping[str, Any]] = (),
    now: datetime | None = None,
) -> str:
    """The page as HTML text that needs no other file and no network.

    pairs: about how many example questions to show, and as many pairs. seeds: summaries of runs with other seeds.
    """
    kinds = _kinds(contents.figures.values())
    page = {
        **common(contents.run, title=title, config=config, now=now),
        "headline": _headline(contents.figures),
        "accuracy": _accuracy_table(contents),
        "plots": _arm_plots(contents, kinds),
        "held_out": [table for kind in kinds if (table := _held_out_table(contents.figures, kind))],
        "rewards": _reward_plots(contents.summary["arms"], kinds),
        "training": sections.curve_plots(contents.run.log),
        "seeds": _seeds_table([contents.summary, *seeds], kinds) if seeds else None,
        "examples": _examples(contents, pairs, seed=int(config.get("seed", 0))),
        "pairs": _pair_examples(contents.run.folder / "pairs", contents.run.own_pairs, pairs),
        "base": BASE,
    }
    return fill("preference_page.html.j2", page)


def _by_id(answers: Iterable[Record]) -> dict[str, Record]:
    return {str(answer["id"]): answer for answer in answers}


def _kinds(figures: Iterable[Mapping[str, Any]]) -> list[str]:
    """Kinds of pairs, `all` last and only where there is more than one kind, or none."""
    found = sorted({kind for each in figures for kind in each.get("held_out") or {}} - {ALL})
    return [*found, ALL] if len(found) != 1 else found


def _headline(figures: Mapping[str, Mapping[str, Any]]) -> str:
    sentences = []
    base, main, dpo = (figures.get(arm, {}) for arm in (BASE, MAIN, "dpo"))
    for group, after in sorted((main.get("accuracy") or {}).items()):
        before = (base.get("accuracy") or {}).get(group)
        if before is not None and group.endswith("disagree"):
            other = f", {sections.percent(dpo['accuracy'][group])} after DPO" if dpo.get("accuracy") else ""
            what = group.replace("/", "s, pictures that ")
            sentences.append(
                f"{what}: {sections.percent(before)} right before training, {sections.percent(after)} after mDPO{other}."
            )
    if main.get("held_out") and dpo.get("held_out"):
        gaps = [each["held_out"][ALL]["gap"]["crop"] for each in (main, dpo)]
        times = f" ({gaps[0] / gaps[1]:.1f} times)" if gaps[1] > 0 else ""
        sentences.append(f"Gap between true and cropped picture: {gaps[0]:.2f} nats after mDPO, {gaps[1]:.2f} after DPO{times}.")
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


def _accuracy_table(contents: PreferenceContents) -> sections.Table | None:
    groups = sorted({_group(answer) for answers in contents.answers.values() for answer in answers.values()})
    if not groups:
        return None
    rows: list[list[str | Proportion | None]] = [
        [name_of(arm), *(proportion([a for a in answers.values() if _group(a) == group]) for group in groups)]
        for arm, answers in contents.answers.items()
    ]
    return sections.Table(
        caption="Share of questions answered right, with 95 % Wilson intervals; the same questions for every arm."
        + (f" Answers were compared with the truth by: {match}." if (match := contents.run.evaluation_match) else ""),
        head=["Arm", *(group.replace("/", ": ") for group in groups)],
        rows=rows,
    )


def _group(answer: Record) -> str:
    return str(answer.get("group") or answer["format"])


def _held_out_table(figures: Mapping[str, Mapping[str, Any]], kind: str) -> sections.Table | None:
    found = {arm: each["held_out"][kind] for arm, each in figures.items() if kind in (each.get("held_out") or {})}
    if not found:
        return None
    rows = []
    for arm, each in found.items():
        rewards = each.get("rewards") or {}
        cells = [f"{each['gap'][name]:.2f}" for name in CORRUPTIONS]
        cells += [_signed(rewards.get(name)) for name in ("chosen", "rejected")]
        rows.append(
            [name_of(arm), *cells, f"{each['logps']['chosen']:.2f}".replace("-", "−"), sections.percent(each["preferred"])]
        )
    pairs = max(each["pairs"] for each in found.values())
    what = "All held-out pairs" if kind == ALL else f"Held-out pairs of kind {kind}"
    return sections.Table(
        caption=f"{what} ({pairs}). Gap: log p(chosen | picture) − log p(chosen | corrupted picture), in nats.",
        head=["Arm", *(f"Gap, {name}" for name in CORRUPTIONS), "Chosen reward", "Rejected reward", "log p(chosen)", "Chosen likelier"],
        rows=rows,
    )  # fmt: skip


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def _arm_plots(contents: PreferenceContents, kinds: Sequence[str]) -> list[str]:
    figures = contents.figures
    arms = list(figures)
    drawn = []
    groups = sorted(
        {_group(a) for answers in contents.answers.values() for a in answers.values() if _group(a).endswith("disagree")}
    )
    shares = {
        group.removesuffix("/disagree"): [
            proportion([a for a in contents.answers.get(arm, {}).values() if _group(a) == group]) for arm in arms
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


def _reward_plots(arms: Mapping[str, Mapping[str, Any]], kinds: Sequence[str]) -> list[str]:
    """The chosen reward over training, one line an arm, one plot a kind."""
    drawn = []
    for kind in kinds:
        key = "rewards/chosen" if kind == ALL else f"rewards/chosen_{kind}"
        series = {}
        for arm, figures in arms.items():
            curves = figures.get("curves") or {}
            points = [
                (step, value)
                for step, value in zip(curves.get("step", ()), curves.get(key, ()), strict=False)
                if value is not None
            ]
            if points:
                series[name_of(arm)] = ([step for step, _ in points], [value for _, value in points])
        if series:
            title = "Chosen reward" if kind == ALL else f"Chosen reward, {kind}s"
            drawn.append(plots.curve_plot(series, name=f"chosen-{kind}", title=title, zero=True))
    return drawn


def _seeds_table(summaries: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> sections.Table:
    """Mean and range of each figure over runs with different seeds."""
    values = over_seeds(summaries)
    columns = sorted({name for arm in values.values() for name in arm})
    wanted = [name for name in columns if name.startswith("accuracy/") and name.endswith("disagree")]
    wanted += [
        f"{what}/{kind}/{name}" for kind in kinds for what, name in (("gap", "crop"), ("gap", "blank"), ("reward", "chosen"))
    ]
    wanted = [name for name in wanted if name in columns]
    rows = [[name_of(arm), *(_mean_and_range(found.get(name, [])) for name in wanted)] for arm, found in values.items()]
    return sections.Table(
        caption=f"Mean over {len(summaries)} seeds, smallest to largest in brackets.",
        head=["Arm", *(name.replace("/", " ") for name in wanted)],
        rows=rows,
    )


def _mean_and_range(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})".replace("-", "−")


def _examples(contents: PreferenceContents, count: int, *, seed: int) -> list[Example]:
    """Questions on which the base and some arm differ, spread over the groups, and some more."""
    base = contents.answers.get(BASE, {})
    by_group: dict[str, list[Record]] = {}
    for answer in base.values():
        others = [answers[answer["id"]] for arm, answers in contents.answers.items() if arm != BASE and answer["id"] in answers]
        if answer.get("images") and any(other["correct"] != answer["correct"] for other in others):
            by_group.setdefault(_group(answer), []).append(answer)
    each = -(-count // len(by_group)) if by_group else 0
    folder = contents.run.folder / "evaluate" / "before"
    return [_example(contents, record, folder, seed) for group in sorted(by_group) for record in spread(by_group[group], each)]


def _example(contents: PreferenceContents, record: Record, folder: Path, seed: int) -> Example:
    answers = {arm: found[record["id"]] for arm, found in contents.answers.items() if record["id"] in found}
    return Example(
        question=question_of(record["prompt"]),
        truth=str(record["answer"]),
        cells=_cells(record, folder, seed),
        answers=[(name_of(arm), str(answer["response"]), bool(answer["correct"])) for arm, answer in answers.items()],
    )


def _cells(record: Record, folder: Path, seed: int) -> list[Cell]:
    """The asked-about picture and a draw of each corruption of it."""
    picture = picture_of(record, int(record.get("target") or 0), folder)
    if picture is None:
        return []
    shown: dict[str, Image.Image] = {"picture": picture}
    for kind in CORRUPTIONS:
        shown[kind] = corrupt(picture, Corruption(kind=kind, seed=seed), str(record["id"]))
    return [Cell(uri=data_uri(sized(each)), alt=name.capitalize(), caption=name) for name, each in shown.items()]


def _pair_examples(folder: Path, records: Sequence[Record], count: int) -> list[dict[str, Any]]:
    shown = []
    for record in spread(records, count):
        picture = picture_of(record, 0, folder) if record.get("images") else None
        cells = [] if picture is None else [Cell(uri=data_uri(sized(picture)), alt="The picture")]
        texts = {side: text_of(record[side]) for side in ("chosen", "rejected")}
        shown.append({"question": question_of(record["prompt"]), "cells": cells, **texts})
    return shown
