"""The page: everything a run folder says, laid out by the template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined

from . import plots, sections
from .contents import RunContents, label_of
from .examples import Cell, picture_name, picture_of, picture_side, question_of
from .heatmaps import MOMENTS, HeatExample, HeatMaps
from .pictures import data_uri, heat_gradient, outlined, overlaid, sized


def render(
    contents: RunContents,
    *,
    title: str,
    config: Mapping[str, Any],
    heat: HeatMaps | None,
    pairs: int = 6,
    now: datetime | None = None,
) -> str:
    """The page as HTML text that needs no other file and no network.

    config: nested settings, shown as YAML. pairs: about how many example pairs to show.

    Raises StageError where matplotlib is not installed.
    """
    page = {
        **common(contents, title=title, config=config, now=now),
        **_accuracy(contents),
        **_heat(contents, heat),
        "arms": sections.arms_table(contents),
        "selection": sections.selection_table(contents),
        "selection_text": _selection_text(contents),
        "ratios": sections.ratio_plots(contents),
        "ratios_caption": _ratios_caption(contents, heat),
        "training": sections.curve_plots(contents.log),
        "training_caption": "Logged every few optimizer steps; dashed lines are evaluations during training.",
        "pairs": sections.pair_groups(contents, pairs),
    }
    return fill("page.html.j2", page)


def fill(template: str, page: Mapping[str, Any]) -> str:
    """HTML text: one of this folder's templates with its values. `layout.html.j2` names those that every page needs."""
    folder = resources.files(__package__)

    def read(name: str) -> str:
        return folder.joinpath(name).read_text(encoding="utf-8")

    environment = Environment(
        loader=FunctionLoader(read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": sections.percent, "bare": sections.bare, "points": sections.points, "ratio": _ratio}
    return environment.get_template(template).render(page=page, css=read("page.css"))


def common(contents: RunContents, *, title: str, config: Mapping[str, Any], now: datetime | None) -> dict[str, Any]:
    """What the layout shows of any run."""
    now = now or datetime.now(UTC)
    return {
        "title": title,
        "facts": [
            ("Run", contents.folder.name),
            ("Model", config.get("model", "–")),
            ("Seed", config.get("seed", "–")),
            ("Date", now.strftime("%Y-%m-%d %H:%M UTC")),
        ],
        "lost": sections.lost_table(contents),
        "seconds": sections.seconds_table(contents),
        "versions": sections.versions_table(),
        "config": yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False, allow_unicode=True) if config else "",
    }


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _accuracy(contents: RunContents) -> dict[str, Any]:
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
            change = f"{sections.points(after - before)} points"
            sentences.append(f"{name}: {sections.percent(before)} before training, {sections.percent(after)} after ({change}).")
        elif (only := before if after is None else after) is not None:
            sentences.append(f"{name}: {sections.percent(only)} {'before' if after is None else 'after'} training.")
    return " ".join(sentences)


def _selection_text(contents: RunContents) -> str:
    pairs = contents.pairs or []
    compared = f" Answers were compared with the truth by: {contents.selection_match}." if "select" in contents.summaries else ""
    return f"{len(pairs):,} pairs selected from {len(pairs) + len(contents.dropped):,} answers.{compared}"


def _ratios_caption(contents: RunContents, heat: HeatMaps | None) -> str:
    where = "" if heat is None else f", decoder layer {heat.layer}"
    marks = " Dashed: the threshold for n pictures; answers to its left may be selected." if contents.thresholds() else ""
    return f"Share of each answer's attention on pictures that falls on the asked-about one{where}.{marks}"


def _heat(contents: RunContents, heat: HeatMaps | None) -> dict[str, Any]:
    if heat is None or not heat.examples:
        note = "No heat maps: they need answers before and after training. Run `mmdpo evaluate`, then `mmdpo report`."
        return {"heatmaps": [], "heatmaps_note": note, "heat_layer": None, "heat_gradient": ""}
    groups: dict[str, list[Any]] = {}
    for example in heat.examples:
        groups.setdefault(label_of(example.record["format"]), []).append(_heat_example(contents, example, heat.centre_crop))
    shown = [sections.Group(label=label, examples=examples) for label, examples in groups.items()]
    return {"heatmaps": shown, "heatmaps_note": "", "heat_layer": heat.layer, "heat_gradient": heat_gradient()}


def _heat_example(contents: RunContents, example: HeatExample, centre_crop: bool) -> dict[str, Any]:
    record = example.record
    answers = [
        {
            "label": f"Answer {moment}",
            "text": example.answers[moment]["response"],
            "correct": example.answers[moment].get("correct"),
            "ratio": example.ratios[moment],
        }
        for moment in MOMENTS
    ]
    return {
        "question": question_of(record["prompt"]),
        "truth": record["answer"],
        **_heat_strip(contents, example, centre_crop),
        "answers": answers,
    }


def _heat_strip(contents: RunContents, example: HeatExample, centre_crop: bool) -> dict[str, Any]:
    """Several pictures: a column each, rows picture, before, after. One picture: those three side by side."""
    record = example.record
    names = ("picture", *MOMENTS)
    if len(record["images"]) == 1:
        cells = [cell for cell in (_heat_cell(contents, example, 0, name, centre_crop) for name in names) if cell]
        return {"columns": "repeat(3, minmax(0, 12rem))", "rows": [{"label": None, "cells": cells}]}
    rows = []
    for name in names:
        found = (_heat_cell(contents, example, index, name, centre_crop) for index in range(len(record["images"])))
        rows.append({"label": "" if name == "picture" else name, "cells": [cell for cell in found if cell]})
    return {"columns": f"3.2rem repeat({len(record['images'])}, minmax(0, 7rem))", "rows": rows}


def _heat_cell(contents: RunContents, example: HeatExample, index: int, kind: str, centre_crop: bool) -> Cell | None:
    """A picture, plain (`picture`) or under the attention of a moment; None where its file cannot be read."""
    record, several = example.record, len(example.record["images"]) > 1
    picture = picture_of(record, index, contents.folder / "evaluate" / "before")
    if picture is None:
        return None
    shown, name = sized(picture, picture_side(record)), picture_name(record, index)
    target = several and index == record.get("target")
    if kind == "picture":
        alt = f"{name}{', the asked-about one' if target else ''}".capitalize()
        return Cell(uri=data_uri(outlined(shown, record.get("box"))), alt=alt, caption=name if several else "", target=target)
    # One scale for both moments, or a change of colour would not be a change of attention.
    top = max(float(heat.max()) for maps in example.maps.values() for heat in maps) or 1.0
    heat = example.maps[kind][index]
    caption = f"{heat.sum():.0%}" if several else f"{kind}: {example.ratios[kind]:.0%} on the target"
    drawn = outlined(overlaid(shown, heat / top, centre_crop=centre_crop), record.get("box"))
    alt = f"Attention {kind} training over {name}: {caption.removeprefix(f'{kind}: ')}"
    return Cell(uri=data_uri(drawn), alt=alt, caption=caption, target=target)
