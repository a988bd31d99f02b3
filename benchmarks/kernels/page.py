"""Tables, goals and charts from the result files of the harness."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure, readme
from benchmarks.kernels import static_page
from benchmarks.kernels.case import WITHOUT_MASS, Ceilings
from benchmarks.kernels.goals import GOALS, Missing, Result

PAGE, RESULTS_PAGE = "docs/kernels.md", "docs/results.md"
DEVICES = {"cpu": "python -m benchmarks", "cuda": "make gpu"}
GOAL_COLUMNS = ["what", "figure", "goal", ""]
# Of the goals, those that stand beside a training step's figures.
HEADS = ("than TRL's as its trainer calls it", "against Liger's DPO", "mDPO of 64 triples")
# Nobody asks peers for it.
NOT_MISSED = {"lse"}


def write_all() -> list[Path]:
    """The sections of `docs/kernels.md` and its charts, of heads in `docs/results.md`, and README's table, from the committed results alone.

    Returns what was written.
    """
    written = [measure.ROOT / PAGE]
    for device, command in DEVICES.items():
        path = measure.RESULTS / f"ops_{device}.json"
        if not path.exists():
            measure.write_section(
                PAGE, f"ops_{device}", f"Not measured yet; `{command}` on a machine that has one makes these tables."
            )
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        picture = measure.ROOT / "docs" / f"kernels_{device}.svg"
        pieces = [text_of(content)]
        if chart(content, picture):
            written.append(picture)
        if device == "cpu":
            pieces += [_of_another_kind(path) for path in sorted(measure.RESULTS.glob("ops_cpu_*.json"))]
        if picture.exists():
            pieces.insert(0, f"![milliseconds of each contestant, by case]({picture.name})")
        measure.write_section(PAGE, f"ops_{device}", "\n\n".join(pieces))
        if device == "cpu":
            heads = [row for row in goal_rows(content) if any(words in row[0] for words in HEADS)]
            measure.write_section(RESULTS_PAGE, "heads", measure.markdown(GOAL_COLUMNS, heads))
            written.append(measure.ROOT / RESULTS_PAGE)
    static_page.write()
    return [*written, readme.write()]


def _of_another_kind(path: Path) -> str:
    """The goals on a kind of CPU that is not the page's."""
    content = json.loads(path.read_text(encoding="utf-8"))
    on, goals = content["machine"], measure.markdown(GOAL_COLUMNS, goal_rows(content))
    kind = path.stem.removeprefix("ops_cpu_")
    return f"### Goals on another kind of CPU, {kind}\n\n`{path.name}`: {on['cpu']}, {on['threads']} threads.\n\n{goals}"


def text_of(content: dict[str, Any]) -> str:
    """Markdown of a result: the machine, the goals, a table a case."""
    on = content["machine"]
    what = on["gpu"] or f"{_cpu(on)}, {on['threads']} threads"
    ceilings = Ceilings(**content["ceilings"])
    packages = ", ".join(f"{name} {on['packages'][name]}" for name in ("torch", "triton"))
    pieces = [
        f"{what}, {packages}; {content['dtype']}. Measured ceilings: {ceilings.flops_per_second / 1e9:,.0f} GFLOP/s in a matrix product, "
        f"{ceilings.bytes_per_second / 1e9:,.1f} GB/s in a copy."
    ]
    goals = goal_rows(content)
    if goals:
        pieces.append(measure.markdown(GOAL_COLUMNS, goals))
    for entry in content["cases"]:
        pieces.append(f"### {title(entry)}\n\n{_sizes(entry)}\n\n{measure.markdown(*table(entry))}{_absent(entry)}")
    return "\n\n".join(pieces)


def _cpu(machine: dict[str, Any]) -> str:
    return f"{machine['cpu']} ({machine['cpu_kind']})" if "cpu_kind" in machine else str(machine["cpu"])


def title(entry: dict[str, Any]) -> str:
    """What a case is, in one line."""
    return f"{entry['op']}, {entry['case']}: {entry['why']} ({entry['timed']})"


def table(entry: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a case: contestants with a time, fastest first, then those that were wrong or failed."""
    found = entry["contestants"]
    timed = sorted((name for name in found if "median" in found[name]), key=lambda name: found[name]["median"])
    baseline = next((name for name in timed if not found[name]["ours"] and not _omitted(found[name])), None)
    whole_calls = any("median_of_whole_call" in one for one in found.values())
    header = ["contestant", "ms (min to max)", *(["whole call, ms"] if whole_calls else [])]
    header += [f"times as fast as {baseline}" if baseline else "", "% of floor", "peak MB", ""]
    rows = []
    for name in timed:
        one = found[name]
        call = [_ms(one["median_of_whole_call"])] if "median_of_whole_call" in one else [""] * whole_calls
        peak = one.get("peak_bytes")
        rows.append(
            [
                _label(name, one),
                f"{_ms(one['median'])} ({_ms(min(one['seconds']))} to {_ms(max(one['seconds']))})",
                *call,
                f"{found[baseline]['median'] / one['median']:.2f}" if baseline else "",
                f"{one['percent_of_floor']:.0f}",
                "" if peak is None else f"{peak / 1e6:.1f}",
                _without(one),
            ]
        )
    for kind in ("wrong", "failed"):
        rows += [
            [_label(name, one), "", *[""] * whole_calls, "", "", "", f"{kind}: {one[kind]}"]
            for name, one in found.items()
            if kind in one
        ]
    return header, rows


def goal_rows(content: dict[str, Any]) -> list[list[str]]:
    """The goals of the result's device: figure, goal, met or missed. None for tiny inputs."""
    if content["size"] != content["device"]:
        return []
    rows = []
    for goal in GOALS:
        if goal.device != content["device"]:
            continue
        try:
            found = goal.find(Result(content))
            rows.append([goal.what, found.figure, goal.wanted, "met" if found.met else "missed"])
        except Missing as answer:
            rows.append([goal.what, str(answer), goal.wanted, "not measured"])
    return rows


def chart(content: dict[str, Any], path: Path) -> bool:
    """Draw every case as bars of milliseconds, the floor as a line. Returns False without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch
    except ImportError:
        return False
    entries = [entry for entry in content["cases"] if _drawn(entry)]
    if not entries:
        return False
    lines = -(-len(entries) // 2)
    heights = [max(len(_drawn(entry)) for entry in entries[2 * line : 2 * line + 2]) + 2.5 for line in range(lines)]
    # Text stays text, and the same figures make the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kernels", "font.size": 8}):
        figure = Figure(figsize=(11, 0.4 + 0.2 * sum(heights)), layout="constrained")
        panels = figure.subplots(lines, 2, squeeze=False, height_ratios=heights).flatten()
        for panel, entry in zip(panels, entries, strict=False):
            _draw(panel, entry)
        for panel in panels[len(entries) :]:
            panel.set_axis_off()
        meaning = [Patch(color=OURS, label="ours"), Patch(color=PEER, label="peers"), Line2D([], [], color=FLOOR, label="floor")]
        figure.legend(handles=meaning, loc="outside upper right", ncols=3, frameon=False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return True


OURS, PEER, FLOOR = "#1b6ca8", "#b8b8b8", "#c0392b"


def _drawn(entry: dict[str, Any]) -> list[str]:
    """Contestants with a time, slowest first. The reference is in the tables; beside it the others could not be told apart."""
    found = entry["contestants"]
    names = [name for name in found if "median" in found[name] and not name.startswith("reference")]
    return sorted(names, key=lambda name: -found[name]["median"])


def _draw(panel: Any, entry: dict[str, Any]) -> None:
    found, names = entry["contestants"], _drawn(entry)
    values = [1e3 * found[name]["median"] for name in names]
    panel.barh(range(len(names)), values, color=[OURS if found[name]["ours"] else PEER for name in names])
    # Of ours, the names say so.
    labels = [name if found[name]["ours"] else name + _without(found[name], " (", ")") for name in names]
    panel.set_yticks(range(len(names)), labels)
    for index, value in enumerate(values):
        panel.text(value, index, f" {_ms(value / 1e3)}", va="center")
    panel.axvline(1e3 * entry["floor_seconds"], color=FLOOR, linewidth=1)
    panel.set_xlim(0, 1.15 * max(values))
    panel.set_title(f"{entry['op']} {entry['case']}, {entry['timed']}, ms", loc="left", fontsize=8, fontweight="bold")
    panel.spines[["top", "right"]].set_visible(False)


def _absent(entry: dict[str, Any]) -> str:
    absent = {name: one for name, one in entry["contestants"].items() if "reason" in one and not name.endswith(WITHOUT_MASS)}
    reasons = [f"{name}: {one['reason']}" for name, one in absent.items()]
    return f"\n\nNot here: {'; '.join(reasons)}." if reasons else ""


def _omitted(one: dict[str, Any]) -> Sequence[str]:
    return [name for name in one["omits"] if name not in NOT_MISSED]


def _without(one: dict[str, Any], before: str = "", after: str = "") -> str:
    return f"{before}without {', '.join(_omitted(one))}{after}" if _omitted(one) else ""


def _label(name: str, one: dict[str, Any]) -> str:
    return f"**{name}**" if one["ours"] else f"{name} {one['version'] or ''}".strip()


def _sizes(entry: dict[str, Any]) -> str:
    sizes = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in entry["sizes"].items())
    dtype = f"; {entry['dtype']}" if "dtype" in entry else ""
    return (
        f"{sizes}{dtype}. At least {entry['flops'] / 1e9:.3g} GFLOP and {entry['bytes'] / 1e6:.3g} MB: {_ms(entry['floor_seconds'])} ms, "
        f"bound by {entry['bound']}."
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"
