"""What is known of the kernels without a GPU, as sections of docs/kernels.md: how their forms compile, and the static table."""

from __future__ import annotations

import json
from typing import Any

from benchmarks import measure
from benchmarks.kernels.machine_code import DIM, GPUS, LENGTH
from benchmarks.measure import markdown, write_section

PAGE = "docs/kernels.md"

GOALS = {"forward": 450.0, "backward": 350.0}
"""TFLOP/s, causal, head dim 128, 8k."""
MASS_GOAL = 0.05
_UNITS = ("tensor", "shared", "exponential", "float", "integer", "issue")
_COUNTS = ("tensor", "exponential", "wait", "load", "shared", "float", "integer")


def write() -> None:
    """The sections from the committed results, where they are."""
    for section, page in (("ahead_of_time", compiled_text), ("static_table", text_of)):
        path = measure.RESULTS / f"{section}.json"
        if path.exists():
            write_section(PAGE, section, page(json.loads(path.read_text(encoding="utf-8"))))


def compiled_text(content: dict[str, Any]) -> str:
    """Of what `ahead_of_time` writes: by op and target how many forms, and the most that one of them takes."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for form in content["forms"]:
        groups.setdefault((form["label"].split()[0], form["target"]), []).append(form)
    rows = [
        [
            f"`{op}`, sm_{target}",
            str(len(forms)),
            str(max(form["registers"] for form in forms)),
            f"{max(form['shared'] for form in forms) / 1024:.0f}",
            str(sum(form["problem"] is not None for form in forms)),
        ]
        for (op, target), forms in sorted(groups.items())
    ]
    header = ["", "forms", "most registers", "most shared memory, KB", "with a problem"]
    return f"Triton {content['triton']}, {len(content['forms'])} forms.\n\n{markdown(header, rows)}"


def text_of(content: dict[str, Any]) -> str:
    """Goals, then a table a target, the best of each kernel first."""
    rows = content["rows"]
    targets = [target for target in GPUS if any(row["target"] == target for row in rows)]
    pieces = [
        f"**A prediction from the machine code, not a measurement**: Triton {content['triton']}, no GPU seen. Rates are NVIDIA's published ones "
        "at boost clock. *At the limit*: the unit with most clocks always busy, nothing else waited for. *Simulated*: products, arithmetic "
        "and waits in the order of the code, groups of four warps sharing the units. Memory, first and last tiles are left out, so reality is "
        "below both. What to read off is the order of the variants, and which unit to relieve.",
        markdown(["predicted", *(f"{GPUS[target].name} (sm_{target})" for target in targets), "goal"], _goals(rows, targets)),
    ]
    for target in targets:
        shown = [row for row in rows if row["target"] == target and (row["variant"] == "shipped" or row["call"] != "tree")]
        shown.sort(key=lambda row: (_order(row, rows), -_figure(row)))
        gpu = GPUS[target]
        header = ["kernel, call", "variant", "tile, warps, stages", *(f"{name} instr." for name in _COUNTS)]
        header += [*(f"{name} clocks" for name in _UNITS), "limit", "at the limit", "simulated"]
        pieces.append(
            f"### {gpu.name}, sm_{target}: a tile on one of {gpu.processors} processors\n\n{markdown(header, list(map(_line, shown)))}"
        )
    pieces.append(
        "Instructions are those of one warp in one round of the loop, tensor-core instructions of sm_90 those of four warps. Clocks are of all "
        "warps of a block of threads. Figures are TFLOP/s of all products of the tile, which in the backward are seven where one counts five."
    )
    return "\n\n".join(pieces)


def _order(row: dict[str, Any], rows: list[dict[str, Any]]) -> int:
    kinds = list(dict.fromkeys((each["kernel"], each["call"]) for each in rows))
    return kinds.index((row["kernel"], row["call"]))


def _figure(row: dict[str, Any]) -> float:
    figure: float = row.get("tflops_simulated", row.get("tflops_at_limit", 0.0))
    return figure


def _line(row: dict[str, Any]) -> list[str]:
    name = [
        f"{row['kernel']}, {row['call']}",
        row["variant"],
        f"{'x'.join(map(str, row['tile']))}, {row['warps']}, {row['stages']}",
    ]
    if "problem" in row:
        return [*name, *[""] * (len(_COUNTS) + len(_UNITS)), row["problem"], "", ""]
    counts = [str(row["instructions"].get(kind, 0)) for kind in _COUNTS]
    clocks = [f"{row['clocks'][unit]:,.0f}" if unit in row["clocks"] else "" for unit in _UNITS]
    figures = [f"{row[key]:,.0f}" if key in row else "" for key in ("tflops_at_limit", "tflops_simulated")]
    return [*name, *counts, *clocks, row["limit"], *figures]


def _goals(rows: list[dict[str, Any]], targets: list[int]) -> list[list[str]]:
    lines = []
    for which, label in (("shipped", "tiles that ship"), ("best", "best candidates")):
        for way, goal in GOALS.items():
            found = [_predicted(rows, target, way, which) for target in targets]
            words = ["" if each is None else f"{each:,.0f} TFLOP/s" for each in found]
            lines.append([f"{way}, causal, head dim {DIM}, {LENGTH:,} tokens, {label}", *words, f"at least {goal:.0f} on H100"])
        mass = [_mass_share(rows, target, which) for target in targets]
        words = ["" if each is None else f"{100 * each:.1f} % more" for each in mass]
        lines.append([f"masses beside the forward of a tree, {label}", *words, f"at most {100 * MASS_GOAL:.0f} % more"])
    return lines


def _clocks(rows: list[dict[str, Any]], target: int, kernel: str, call: str, which: str) -> tuple[float, int] | None:
    """Least clocks a (query, key) pair and the queries of its tile."""
    found = [
        (row.get("simulated_clocks", row["limit_clocks"]) / (row["tile"][0] * row["tile"][1]), row["tile"])
        for row in rows
        if (row["target"], row["kernel"], row["call"]) == (target, kernel, call)
        and "problem" not in row
        and (which == "best" or row["variant"] == "shipped")
    ]
    if not found:
        return None
    clocks, tile = min(found)
    return clocks, max(tile)


def _predicted(rows: list[dict[str, Any]], target: int, way: str, which: str) -> float | None:
    """TFLOP/s by the usual count: two products forward, five backward, half of the square; tiles on the diagonal are whole."""
    kernels = ("forward",) if way == "forward" else ("grad_key", "grad_query")
    parts = [_clocks(rows, target, kernel, "causal", which) for kernel in kernels]
    if any(part is None for part in parts):
        return None
    clocks = sum(part[0] * (LENGTH + part[1]) / LENGTH for part in parts if part is not None)
    gpu = GPUS[target]
    products = 2 if way == "forward" else 5
    return 2 * products * DIM / clocks * gpu.processors * gpu.clock / 1e12


def _mass_share(rows: list[dict[str, Any]], target: int, which: str) -> float | None:
    with_mass, without = (_clocks(rows, target, "forward", call, which) for call in ("tree mass", "tree"))
    return None if with_mass is None or without is None else with_mass[0] / without[0] - 1
