"""The short tables that a run ends with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.table import Table

from mmdpo_trainers.data.left_out import by_stages, reason_words
from mmdpo_trainers.data.records import FORMATS, TEXT
from mmdpo_trainers.methods import method_named
from mmdpo_trainers.methods.held_out import ALL, flat_figures
from mmdpo_trainers.report.benchmarks import notes_of


def run_tables(summary: dict[str, Any]) -> list[Table]:
    """Those that the run's method names, from the run's summary, and what was left out."""
    found = [TABLES[name](summary) for name in method_named(summary["method"]).tables]
    found += benchmark_tables(summary.get("benchmarks") or {})
    return [table for table in (*found, _lost_table(summary)) if table is not None]


def benchmark_tables(summary: dict[str, Any]) -> list[Table]:
    """Each published benchmark's figures, with intervals, and the tables of papers that have one of them; none where there are no benchmarks."""
    if not summary:
        return []
    models = summary["models"]
    table = Table(title="published benchmarks, with 95 % intervals", title_justify="left", pad_edge=False, collapse_padding=True)
    table.add_column("benchmark")
    changed = (
        [f"change, {who}" for who in summary["changes"]] if len(summary["changes"]) > 1 else ["change"] * len(summary["changes"])
    )
    for name in ("number", *models, *changed):
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for key, described in summary["benchmarks"].items():
        for name, figure in described["figures"].items():
            of_models = [(models[who].get(key) or {"figures": {}})["figures"].get(name) for who in models]
            if not any(of_models):
                continue
            of_changes = [(changes.get(key) or {"figures": {}})["figures"].get(name) for changes in summary["changes"].values()]
            count = next(each["count"] for each in of_models if each)
            label = f"{described['title']}, {figure['label'].lower()}"
            cells = [*(_figure_cell(each) for each in of_models), *(_figure_cell(each, "+") for each in of_changes)]
            table.add_row(label if key == described["suite"] else f"{key}: {label}", f"{count:,}", *cells)
    if notes := notes_of(summary):
        table.caption, table.caption_justify = "\n".join(notes), "left"
    return [table, *(_published_table(each) for each in summary["tables"].values())]


def _figure_cell(figure: dict[str, Any] | None, sign: str = "") -> str:
    if figure is None or figure["value"] is None:
        return "-"
    interval = figure["interval"]
    ends = f"\n{interval[0]:{sign}.3f} to {interval[1]:{sign}.3f}" if interval else ""
    return f"{figure['value']:{sign}.3f}{ends}"


def _published_table(found: dict[str, Any]) -> Table:
    table = Table(title=f"{found['title']} ({found['paper']})", title_justify="left")
    table.add_column("model", no_wrap=True)
    for name in found["columns"]:
        table.add_column(name, justify="right")
    for who, row in found["rows"].items():
        table.add_row(who, *("-" if row[name] is None else f"{row[name]:.2f}" for name in found["columns"]))
    return table


def _lost_table(summary: dict[str, Any]) -> Table | None:
    """Records left out, by stage and reason; no table where there are none."""
    if not summary.get("lost"):
        return None
    table = Table(title="records left out", title_justify="left")
    for name in ("stage", "reason"):
        table.add_column(name)
    table.add_column("number", justify="right")
    for stage, loss in by_stages(summary["lost"]).items():
        for reason, count in loss["reasons"].items():
            table.add_row(stage, reason_words(reason), f"{count:,}")
        table.add_row(stage, "records, of", f"{loss['records']:,} / {loss['of']:,}")
    return table


def _compared(summary: dict[str, Any], stage: str) -> list[str]:
    """How a stage compared answers with the truth, for a table's title; nothing where it has not run."""
    match = (summary.get("match") or {}).get(stage)
    return [f"answers compared by {match}"] if match else []


def _held_out_table(summary: dict[str, Any]) -> Table | None:
    """Accuracy by group of questions, and gaps and rewards on held-out pairs."""
    # A column an arm: their names are longer than the figures, but can be broken.
    found = {"before": flat_figures(summary["before"])}
    found |= {arm: flat_figures(figures) for arm, figures in summary["arms"].items()}
    found = {arm: figures for arm, figures in found.items() if figures}
    if not found:
        return None
    names = dict.fromkeys(name for figures in found.values() for name in figures)
    table = Table(
        title="accuracy, and log-probability gaps and chosen rewards on held-out pairs",
        title_justify="left",
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("figure", no_wrap=True)
    for arm in found:
        table.add_column(arm.replace("_", "\n"), justify="right")
    for name in names:
        if not name.startswith("reward/") or name.endswith("/chosen"):
            label = name.removeprefix("accuracy/").replace("/", " ")
            table.add_row(label, *(f"{figures[name]:.3f}" if name in figures else "-" for figures in found.values()))
    return table


def _accuracy_table(summary: dict[str, Any]) -> Table | None:
    """Accuracy by format before and after, arms included."""
    if not (summary["accuracy"]["before"] or summary["accuracy"]["after"]):
        return None
    rows = {"before": summary["accuracy"]["before"], "after": summary["accuracy"]["after"]}
    rows |= {f"arm {name}": arm["accuracy"]["after"] for name, arm in summary["arms"].items()}
    # A format without a single question is shown as that.
    asked = (summary.get("counts") or {}).get("evaluate") or {}
    formats = [name for name in (*FORMATS, TEXT) if name in asked or any(name in (row or {}) for row in rows.values())]
    table = Table(title=", ".join(["accuracy", *_compared(summary, "evaluate")]), title_justify="left")
    table.add_column("model", no_wrap=True)
    for name in [*formats, "multi-image mean"]:
        label = name if name != "single" else "single image"
        table.add_column(f"{label} (n = 0)" if asked.get(name) == 0 else label, justify="right")
    for label, row in rows.items():
        if row:
            several = [row[name] for name in formats if name in row and name not in ("single", TEXT)]
            mean = f"{sum(several) / len(several):.3f}" if several else "-"
            table.add_row(label, *(f"{row[name]:.3f}" if name in row else "-" for name in formats), mean)
    return table


def _selection_table(summary: dict[str, Any]) -> Table | None:
    """Pairs by format, and what each rule dropped."""
    if summary["pairs"] is None:
        return None
    # With the formats that no prompt could be made of.
    pairs = {**{name: 0 for name, count in (summary.get("prompts") or {}).items() if not count}, **summary["pairs"]}
    table = Table(title=", ".join(["preference pairs", *_compared(summary, "select")]), title_justify="left")
    table.add_column("what")
    table.add_column("number", justify="right")
    for name in sorted(pairs, key=(*FORMATS, TEXT).index):
        table.add_row(f"selected, {name}", str(pairs[name]))
    for rule, count in (summary["dropped"] or {}).items():
        table.add_row(f"dropped by {rule}", str(sum(count.values()) if isinstance(count, dict) else count))
    return table


def _rewards_table(summary: dict[str, Any]) -> Table | None:
    """Share of held-out pairs whose chosen response has the higher reward, by kind, of the untrained head and of every arm."""
    found = {"untrained head": summary["before"].get("rewards")}
    found |= {arm: figures.get("rewards") for arm, figures in summary["arms"].items()}
    rows = {arm: figures for arm, figures in found.items() if figures}
    if not rows:
        return None
    kinds = list(dict.fromkeys(kind for figures in rows.values() for kind in figures))
    table = Table(title="held-out pairs whose chosen response has the higher reward", title_justify="left")
    table.add_column("model", no_wrap=True)
    for kind in [*kinds, "margin"]:
        table.add_column(kind, justify="right")
    for arm, figures in rows.items():
        shares = (f"{figures[kind]['accuracy']:.3f}" if kind in figures else "-" for kind in kinds)
        table.add_row(arm, *shares, f"{figures[ALL]['margin']:+.3f}")
    return table


TABLES: dict[str, Callable[[dict[str, Any]], Table | None]] = {
    "accuracy": _accuracy_table,
    "selection": _selection_table,
    "held_out": _held_out_table,
    "rewards": _rewards_table,
}
"""What a method may name; each is made of the run's summary, or left out where that has nothing of it."""
