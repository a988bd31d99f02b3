"""Plots as inline SVG whose colours are the page's CSS variables, so that they follow light, dark and print."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mmdpo_trainers.errors import StageError

from .intervals import Estimate, Proportion
from .numbers import number, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib needs real colours; each stands for one CSS variable of the page and is replaced in the finished SVG.
COLOURS = {
    "ink": "#010203",
    "faint": "#040506",
    "before": "#070809",
    "after": "#0a0b0c",
    "right": "#0d0e0f",
    "wrong": "#101112",
    "third": "#131415",
    "fourth": "#161718",
}
SERIES = ("after", "wrong", "third", "fourth", "before")
BINS = 20
WIDE = 4.2
"""Inches of a plot that stands alone; the others' are half a page on a screen, and a phone's whole."""
_NARROW = 3.6
_SMALL = 8.5
_FEW_CELLS = 100
"""Cells of a map whose numbers can be read when they are written in."""

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Line label -> (steps, values)."""


def require_matplotlib() -> Any:
    """The matplotlib module. Raises StageError with the remedy where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise StageError(
            "the report draws its plots with matplotlib, which is not installed: "
            "install it with `pip install 'mmdpo-kernels[train]'`, then run `mmdpo report` again"
        ) from error
    return matplotlib


class _Canvas:
    """Axes being drawn on, and the SVG text once the drawing is finished."""

    def __init__(self, axes: Axes, description: str) -> None:
        self.axes = axes
        self.description = description
        self.legend = False
        self.svg = ""


@contextmanager
def _canvas(name: str, title: str, description: str, *, width: float = _NARROW, height: float = 2.4) -> Iterator[_Canvas]:
    """Axes in the page's style; on exit the figure becomes `canvas.svg`. Sizes in inches; `name` prefixes the SVG's ids."""
    matplotlib = require_matplotlib()
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), COLOURS["ink"]),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), COLOURS["faint"]),
        **{"font.size": 10, "legend.fontsize": 9, "xtick.labelsize": 9, "ytick.labelsize": 9, "axes.unicode_minus": True},
        **{"grid.linewidth": 0.5, "lines.linewidth": 1.6, "axes.facecolor": "none", "legend.frameon": False},
        **{"axes.spines.top": False, "axes.spines.right": False},
        # Text stays text, so that the page's fonts and colours reach it; labels from data are never formulas.
        **{"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False},
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        canvas = _Canvas(figure.add_subplot(), description)
        if title:
            # At the figure's edge: axes beside long labels are too narrow for it.
            figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
        yield canvas
        if canvas.legend:
            _legend(figure, canvas.axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    canvas.svg = _inline(buffer.getvalue(), name, canvas.description)


def _legend(figure: Figure, axes: Axes) -> None:
    """Below the axes, where no line or bar can be, in as many columns as fit; the figure grows by what it takes."""
    handles, labels = axes.get_legend_handles_labels()
    # Of a letter about 0.08 inches, and of the mark before it.
    columns = max(1, min(len(labels), int(figure.get_figwidth() / (0.08 * max(map(len, labels)) + 0.45))))
    figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, columnspacing=1.2, borderaxespad=0.2)


def _inline(svg: str, name: str, description: str) -> str:
    """A standalone SVG file made fit for the inside of a page: no prologue, own ids, theme colours, described to readers."""
    from markupsafe import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", svg.split(">", 1)[0]) + ">" + svg.split(">", 1)[1]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)


def _wrapped(label: str) -> str:
    """A row's label, in lines that leave room for what is drawn."""
    return textwrap.fill(label, 18)


def accuracy_plot(rows: Sequence[tuple[str, Proportion | None, Proportion | None]], *, name: str = "accuracy") -> str:
    """Dots with 95 % Wilson intervals: one row a format, before over after."""
    words = [
        f"{label}: {', '.join(f'{when} {percent(p.value)}' for when, p in (('before', before), ('after', after)) if p)}"
        for label, before, after in rows
    ]
    with _canvas(name, "", "Accuracy by format. " + "; ".join(words), width=WIDE, height=0.6 + 0.5 * len(rows)) as canvas:
        axes = canvas.axes
        canvas.legend = True
        for index, series in enumerate(("before", "after")):
            points = [(place, (before, after)[index]) for place, (_, before, after) in enumerate(rows)]
            known = [(place, point) for place, point in points if point is not None]
            if not known:
                continue
            axes.errorbar(
                [100 * p.value for _, p in known],
                [place + (-0.14, 0.14)[index] for place, _ in known],
                xerr=[[100 * (p.value - p.low) for _, p in known], [100 * (p.high - p.value) for _, p in known]],
                fmt="os"[index], markersize=6, capsize=3, color=COLOURS[series], label=series,
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), [_wrapped(label) for label, _, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        lows = [p.low for _, *pair in rows for p in pair if isinstance(p, Proportion)]
        axes.set_xlim(0 if min(lows, default=0) < 0.35 else 10 * int(min(lows) * 10 - 0.5), 101)
        axes.set_xlabel("accuracy, %")
        axes.grid(axis="x", alpha=0.6)
    return canvas.svg


def ratio_histogram(groups: Mapping[str, Sequence[float]], thresholds: Mapping[int, float], *, name: str, title: str) -> str:
    """Stacked histogram of attention ratios in [0, 1].

    groups: right, wrong, unclear (or answers, where there is no truth) -> ratios. thresholds: number of pictures -> ratio, drawn dashed.
    """
    colours = {"wrong": "wrong", "right": "right", "unclear": "third"}
    counts = ", ".join(f"{len(values)} {group}" for group, values in groups.items())
    marks = ", ".join(f"{number(value, 'g')} for {n} pictures" for n, value in thresholds.items())
    description = f"Histogram of the attention ratio, {title}: {counts}." + (f" Threshold {marks}." if marks else "")
    with _canvas(name, title, description) as canvas:
        axes = canvas.axes
        axes.hist(
            list(groups.values()), bins=BINS, range=(0, 1), stacked=True, label=list(groups),
            color=[COLOURS[colours.get(group, "before")] for group in groups], alpha=0.85,
        )  # fmt: skip
        by_value: dict[float, list[str]] = {}
        for n, value in thresholds.items():
            by_value.setdefault(value, []).append(str(n))
        top = axes.get_ylim()[1]
        axes.set_ylim(0, top * (1.3 if by_value else 1.05))
        for value, labels in by_value.items():
            axes.axvline(value, color=COLOURS["ink"], linewidth=1, linestyle="--")
            axes.text(value - 0.008, top * 1.29, f"n = {', '.join(labels)}", rotation=90, ha="right", va="top", fontsize=_SMALL)
        axes.set_xlim(0, 1)
        axes.set_xlabel("attention ratio")
        axes.set_ylabel("answers")
        canvas.legend = len(groups) > 1
    return canvas.svg


def similarity_histogram(groups: Mapping[str, Sequence[float]], threshold: float) -> str:
    """Stacked histogram of similarities of answers to their truths, at most 1, by how they were made; the threshold dashed."""
    lowest = min(0.0, *(value for values in groups.values() for value in values))
    counts = ", ".join(f"{len(values)} {group}" for group, values in groups.items())
    with _canvas(
        "similarity", "", f"Histogram of similarity to the truth: {counts}. Threshold {number(threshold, 'g')}."
    ) as canvas:
        axes = canvas.axes
        axes.hist(
            list(groups.values()), bins=BINS, range=(lowest, 1), stacked=True, label=list(groups),
            color=[COLOURS[SERIES[place]] for place in range(len(groups))], alpha=0.85,
        )  # fmt: skip
        axes.axvline(threshold, color=COLOURS["ink"], linewidth=1, linestyle="--")
        axes.set_xlabel("similarity to the truth")
        axes.set_ylabel("answers")
        canvas.legend = len(groups) > 1
    return canvas.svg


def dot_plot(
    rows: Sequence[str], series: Mapping[str, Sequence[Proportion | Estimate | None]], *, name: str, title: str, xlabel: str
) -> str:
    """A dot with its interval for each row and series; proportions are shown in percent.

    series: label -> its values, one a row; None: no dot.
    """
    marks: list[tuple[str, int, float, float, float]] = []
    for label, values in series.items():
        for place, value in enumerate(values):
            if value is not None:
                scale = 100 if isinstance(value, Proportion) else 1
                marks.append((label, place, scale * value.value, scale * value.low, scale * value.high))
    words = "; ".join(f"{rows[place]}, {label}: {number(shown, '.3g')}" for label, place, shown, _, _ in marks)
    with _canvas(name, title, f"{title}. {words}", height=1.0 + 0.4 * len(rows)) as canvas:
        axes = canvas.axes
        for index, label in enumerate(series):
            mine = [mark[1:] for mark in marks if mark[0] == label]
            axes.errorbar(
                [shown for _, shown, _, _ in mine],
                [place + 0.2 * (index - (len(series) - 1) / 2) for place, *_ in mine],
                xerr=[[shown - low for _, shown, low, _ in mine], [high - shown for _, shown, _, high in mine]],
                fmt="os^D"[index % 4], markersize=5, capsize=2, color=COLOURS[SERIES[index % len(SERIES)]], label=label,
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), [_wrapped(row) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.margins(x=0.06)
        if all(low >= 0 for *_, low, _ in marks):
            axes.set_xlim(left=0)
        axes.set_xlabel(xlabel)
        axes.grid(axis="x", alpha=0.6)
        canvas.legend = len(series) > 1
    return canvas.svg


def layer_plot(curves: Mapping[str, Sequence[tuple[int, float, float, float]]], marked: Mapping[str, int], *, name: str) -> str:
    """Area under the ROC curve by decoder layer: a line a label with its interval as a band, a dashed line at .5, a ring where marked.

    curves: label -> (layer, value, low, high). marked: label -> layer.
    """
    require_matplotlib()
    from matplotlib.ticker import MaxNLocator

    words = []
    with _canvas(name, "", "", width=WIDE, height=2.6) as canvas:
        axes = canvas.axes
        canvas.legend = True
        for index, (label, points) in enumerate(curves.items()):
            if not points:
                continue
            places, values, lows, highs = zip(*points, strict=True)
            colour = COLOURS[SERIES[index % len(SERIES)]]
            axes.plot(places, values, label=label, color=colour, marker="o" if len(places) < 12 else None, markersize=3)
            axes.fill_between(places, lows, highs, color=colour, alpha=0.12, linewidth=0)
            axes.scatter(
                [place for place in places if place == marked.get(label)],
                [value for place, value in zip(places, values, strict=True) if place == marked.get(label)],
                s=70, facecolors="none", edgecolors=colour, linewidths=1.5,
            )  # fmt: skip
            best = max(points, key=lambda point: point[1])
            words.append(f"{label}: largest {number(best[1], '.2f')} at layer {best[0]}")
        axes.axhline(0.5, color=COLOURS["ink"], linewidth=0.8, linestyle="--")
        # Up to 1 whatever was found: what is missing is to be seen.
        axes.set_ylim(min(0.4, axes.get_ylim()[0]), 1.01)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("decoder layer")
        axes.set_ylabel("AUC, right against wrong")
        axes.grid(alpha=0.5)
        canvas.description = f"AUC of the attention ratio by decoder layer. {'; '.join(words)}."
    return canvas.svg


def head_map(areas: Sequence[Sequence[float | None]], layers: Sequence[int], *, name: str) -> str:
    """Area under the ROC curve by layer (across) and head group (up): blue above .5, orange below, the stronger the further."""
    require_matplotlib()
    from matplotlib.patches import PathPatch, Rectangle
    from matplotlib.path import Path as Outline
    from matplotlib.ticker import MaxNLocator

    cells: dict[tuple[str, float], list[Any]] = {}
    known = []
    for place, row in enumerate(areas):
        for head, value in enumerate(row):
            if value is not None:
                known.append((value, place, head))
                strength = round(min(1.0, 2 * abs(value - 0.5)), 1)
                box = Rectangle((place - 0.5, head - 0.5), 1, 1)
                cells.setdefault(("right" if value > 0.5 else "wrong", strength), []).append(
                    box.get_path().transformed(box.get_patch_transform())
                )
    value, place, head = max(known, default=(0.5, 0, 0))
    description = (
        f"AUC of the attention ratio by layer and head: largest {number(value, '.2f')} at layer {layers[place]}, head {head}."
    )
    heads = max(map(len, areas), default=0)
    with _canvas(name, "", description, width=WIDE, height=min(6.0, 1.6 + 0.16 * heads)) as canvas:
        axes = canvas.axes
        # One path a shade: a thousand heads are a thousand rectangles.
        for (side, strength), outlines in sorted(cells.items()):
            if strength > 0:
                outline = Outline.make_compound_path(*outlines)
                axes.add_patch(PathPatch(outline, facecolor=COLOURS[side], alpha=strength, linewidth=0))
        if len(known) <= _FEW_CELLS:
            for value, place, head in known:
                axes.text(place, head, number(value, ".2f"), ha="center", va="center", fontsize=_SMALL)
        axes.set_xlim(-0.5, len(areas) - 0.5)
        axes.set_ylim(-0.5, heads - 0.5)
        step = max(1, -(-len(layers) // 16))
        axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("decoder layer")
        axes.set_ylabel("head, or group of heads")
    return canvas.svg


def curve_plot(series: Series, *, name: str, title: str, zero: bool = False) -> str:
    """Training curves: one line a series, against the optimizer step. zero: with a line at 0."""
    require_matplotlib()
    from matplotlib.ticker import FixedLocator, MaxNLocator

    ends = ", ".join(
        f"{label} from {number(values[0], '.3g')} to {number(values[-1], '.3g')}" for label, (_, values) in series.items()
    )
    with _canvas(name, title, f"{title} against the training step: {ends}.") as canvas:
        axes = canvas.axes
        for index, (label, (steps, values)) in enumerate(series.items()):
            dashed = label.startswith("eval")
            axes.plot(
                steps, values, label=label, color=COLOURS[SERIES[index % len(SERIES)]], linestyle="--" if dashed else "-",
                marker="o" if len(steps) < 8 else None, markersize=3,
            )  # fmt: skip
        if zero:
            axes.axhline(0, color=COLOURS["ink"], linewidth=0.8)
        places = {step for steps, _ in series.values() for step in steps}
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True) if len(places) > 1 else FixedLocator(list(places)))
        axes.set_xlabel("step")
        axes.grid(alpha=0.5)
        canvas.legend = len(series) > 1
    return canvas.svg


def bar_plot(edges: Sequence[float], counts: Sequence[int], *, name: str, title: str, xlabel: str) -> str:
    """A histogram that is counted already, with a line at 0. edges: one more than counts."""
    known = [place for place, count in enumerate(counts) if count]
    ends = f" between {number(edges[known[0]], '.3g')} and {number(edges[known[-1] + 1], '.3g')}" if known else ""
    with _canvas(name, title, f"{title}: {sum(counts)}{ends}.") as canvas:
        axes = canvas.axes
        axes.stairs(counts, edges, fill=True, color=COLOURS["after"], alpha=0.85)
        axes.axvline(0, color=COLOURS["ink"], linewidth=0.8)
        axes.set_xlabel(xlabel)
        axes.set_ylabel("pairs")
        axes.grid(axis="y", alpha=0.5)
    return canvas.svg
