"""Published benchmarks before and after training, and the tables of papers that have one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import plots
from ..benchmarks import benchmark_summary, notes_of
from ..comparison import PageInputs
from ..intervals import Estimate
from ..numbers import NONE, number
from ..tables import Table, TableCell, measured

_MOST_PLOTTED = 12


def benchmarks(page: PageInputs) -> dict[str, Any] | None:
    """Each benchmark's figures by group, with intervals; None where the run has no benchmark."""
    folder = page.run.folder
    folders = {"before": folder / "evaluate" / "before", "after": folder / "evaluate" / "after"}
    arms = sorted(path.name for path in (folder / "arms").glob("*"))
    found = benchmark_summary({**folders, **{arm: folder / "arms" / arm / "evaluate" / "after" for arm in arms}})
    if not found:
        return None
    names = {who: who.capitalize() if who in folders else page.method.name_of(who) for who in found["models"]}
    return {
        "plot": _plot(found, names),
        "tables": [_table(key, found, names) for key in found["benchmarks"]],
        "published": [_published(each, names) for each in found["tables"].values()],
        "notes": _notes(found, names),
    }


def _plot(found: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The figure that each benchmark is known by, where it is a share."""
    keys = [key for key, each in found["benchmarks"].items() if _first(each)[1]["kind"] == "share"][:_MOST_PLOTTED]
    if not keys:
        return ""
    series = {
        names[who]: [
            _percent((figures.get(key) or {"figures": {}})["figures"].get(_first(found["benchmarks"][key])[0])) for key in keys
        ]
        for who, figures in found["models"].items()
    }
    labels = [_label(key, found["benchmarks"][key]) for key in keys]
    return plots.dot_plot(labels, series, name="benchmarks", title="Published benchmarks", xlabel="%")


def _first(described: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    return next(iter(described["figures"].items()))


def _label(key: str, described: Mapping[str, Any]) -> str:
    return str(described["title"]) if key == described["suite"] else f"{described['title']} ({key})"


def _percent(figure: Mapping[str, Any] | None) -> Estimate | None:
    if figure is None or figure["value"] is None or figure["interval"] is None:
        return None
    return Estimate(100 * figure["value"], *(100 * end for end in figure["interval"]))


def _table(key: str, found: Mapping[str, Any], names: Mapping[str, str]) -> Table:
    described = found["benchmarks"][key]
    models = {who: figures[key] for who, figures in found["models"].items() if key in figures}
    changes = {who: each[key] for who, each in found["changes"].items() if key in each}
    first, _ = _first(described)
    rows, nested = [], []
    for name, figure in described["figures"].items():
        if any(name in each["figures"] for each in models.values()):
            places = (
                [each["figures"].get(name) for each in models.values()],
                [each["figures"].get(name) for each in changes.values()],
            )
            rows.append(_row(figure["label"], *places, figure["kind"]))
    if kind := described["mean_of"]:
        means = [each["figures"].get(f"mean_of_{kind}") for each in models.values()]
        if any(means):
            many = next(each["count"] for each in means if each)
            rows.append([f"Mean over {many} groups by {kind}", NONE, *_row("", means, [None] * len(changes), "share")[2:]])
    for kind, groups in next(iter(models.values()))["by"].items():
        for group in groups:
            for name in described["figures"] if len(groups) <= len(described["figures"]) else [first]:
                of_models = [each["by"].get(kind, {}).get(group, {}).get(name) for each in models.values()]
                of_changes = [each["by"].get(kind, {}).get(group, {}).get(name) for each in changes.values()]
                if any(of_models):
                    nested.append(len(rows))
                    said = group if name == first else f"{group}, {described['figures'][name]['label'].lower()}"
                    rows.append(_row(f"{kind} {said}", of_models, of_changes, described["figures"][name]["kind"]))
    lost = (
        f" {described['lost']['records']:,} of {described['lost']['of']:,} rows could not be asked."
        if "lost" in described
        else ""
    )
    return Table(
        caption=f"{_label(key, described)} ({described['paper']}), {described['records']:,} questions, with 95 % intervals; shares in percent, "
        f"their changes in points, paired by question.{lost}",
        head=["Figure", "Questions", *(names[who] for who in models), *(_changed(who, names, changes) for who in changes)],
        rows=rows,
        nested=nested,
    )


def _changed(who: str, names: Mapping[str, str], changes: Mapping[str, Any]) -> str:
    return "Change" if len(changes) == 1 else f"Change, {names[who]}"


def _row(label: str, models: list[Any], changes: list[Any], kind: str) -> list[TableCell]:
    count = next(each["count"] for each in models if each)
    scale, spec = (100, ".1f") if kind == "share" else (1, ".3f")
    return [
        label,
        f"{count:,}",
        *(_cell(each, scale, spec) for each in models),
        *(_cell(each, scale, f"+{spec}") for each in changes),
    ]


def _cell(figure: Mapping[str, Any] | None, scale: float, spec: str) -> TableCell:
    if figure is None or figure["value"] is None:
        return NONE
    if figure["interval"] is None:
        return number(scale * figure["value"], spec)
    return measured(Estimate(figure["value"], *figure["interval"]), spec, scale)


def _published(found: Mapping[str, Any], names: Mapping[str, str]) -> Table:
    return Table(
        caption=f"{found['title']} ({found['paper']}); what was not measured here is left open.",
        head=["Model", *found["columns"]],
        rows=[
            [names[who], *(NONE if row[name] is None else number(row[name], ".2f") for name in found["columns"])]
            for who, row in found["rows"].items()
        ],
    )


def _notes(found: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """Who judged, what answers could not be read, and where answers to several pictures look."""
    said = notes_of({**found, "models": {names[who]: each for who, each in found["models"].items()}})
    for key, described in found["benchmarks"].items():
        models = {who: figures[key] for who, figures in found["models"].items() if key in figures}
        unread = {names[who]: each["unread"] for who, each in models.items() if each["unread"]}
        if unread:
            counts = ", ".join(f"{who.lower()} {count:,}" for who, count in unread.items())
            said.append(f"{_label(key, described)}: answers out of which nothing could be read: {counts}. They count as wrong.")
        looked = {names[who]: each["attention"] for who, each in models.items() if "attention" in each}
        if looked:
            shares = ", ".join(f"{who} {each['largest']:.3f}" for who, each in looked.items())
            text = (
                f"{_label(key, described)}: share of the attention on pictures that went to the one looked at most, mean over questions with "
                f"several pictures: {shares}."
            )
            if any("ratio" in each for each in looked.values()):
                ratios = ", ".join(f"{who} {each['ratio']:.3f}" for who, each in looked.items() if "ratio" in each)
                text += f" Share on the asked-about picture: {ratios}."
            said.append(text)
    return said
