"""Where answers look: the attention of both models over the same pictures."""

from __future__ import annotations

from typing import Any

from ..comparison import PageInputs
from ..contents import MULTI_IMAGE, RunContents, label_of
from ..examples import Cell, image_name, image_of, image_side, question_of
from ..heatmaps import MOMENTS, HeatExample, HeatMaps
from ..images import data_uri, heat_gradient, outlined, overlaid, sized
from ..tables import Group


def heat_maps(page: PageInputs) -> dict[str, Any]:
    """Attention before and after over the pictures of some questions, by format."""
    contents, heat = page.run, page.heat
    if heat is None or not heat.examples:
        note = "No heat maps: they need answers before and after training. Run `mmdpo evaluate`, then `mmdpo report`."
        return {"heatmaps": [], "heatmaps_note": note}
    groups: dict[str, list[Any]] = {}
    for example in heat.examples:
        groups.setdefault(label_of(example.record["format"]), []).append(_heat_example(contents, example, heat.centre_crop))
    shown = [Group(label=label, examples=examples) for label, examples in groups.items()]
    return {"heatmaps": shown, "heat_layer": heat.layer, "heat_gradient": heat_gradient(), "mended": _mended(contents, heat)}


def _mended(contents: RunContents, heat: HeatMaps) -> str:
    """Which of the answers shown training has mended, and how many there were to choose from."""
    before = {record["id"]: record["correct"] for record in contents.before if record["format"] in MULTI_IMAGE}
    total = sum(record["correct"] and not before.get(record["id"], True) for record in contents.after)
    shown = sum(each.answers["after"]["correct"] and not each.answers["before"]["correct"] for each in heat.examples)
    count = len(heat.examples)
    if not total:
        return f"Training mended no answer to several pictures: {'the answer' if count == 1 else f'all {count} answers'} shown stayed as before."
    chosen = (
        f"Of the {count} answers shown, {shown} went from wrong to right with training, and {count - shown} stayed as they were"
    )
    return f"{chosen}; in all it mended {total:,} of {len(before):,}. Both are spread evenly over the questions."


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
    picture = image_of(record, index, contents.folder / "evaluate" / "before")
    if picture is None:
        return None
    shown, name = sized(picture, image_side(record)), image_name(record, index)
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
