"""What the benchmark prints and writes into the results page."""

from __future__ import annotations

from typing import Any

from benchmarks.measure import markdown, ratios
from benchmarks.runs.whole_shapes.cases import WAYS, baseline_of
from benchmarks.runs.whole_shapes.shapes import METHODS

NAMES = {"dpo": "DPO", "mdpo": "mDPO"}


def text_of(result: dict[str, Any]) -> str:
    """Markdown of one result: a row for each way, a column for each shape, and why what is missing is missing."""
    shapes = list(result["shapes"])
    rows, missing = [], dict[str, list[str]]()
    for method in METHODS:
        for way in WAYS[method]:
            cells = [_cell(result["shapes"][shape].get(method, {}), method, way) for shape in shapes]
            if any(cells):
                rows.append([NAMES[method], way, *cells])
            for shape in shapes:
                row = result["shapes"][shape].get(method, {}).get(way, {})
                answer = row.get("reason") or row.get("note") or (f"it failed: {row['failed']}" if "failed" in row else None)
                if answer:
                    missing.setdefault(f"{way}: {answer}", []).append(f"{shape} {NAMES[method]}")
    pieces = [markdown(["method", "way", *shapes], rows)] if rows else ["Nothing was measured."]
    if missing:
        pieces.append("What could not be had:\n\n" + "\n".join(f"- {answer} ({', '.join(of)})" for answer, of in missing.items()))
    return "\n\n".join([*pieces, _where(result)])


def _cell(rows: dict[str, Any], method: str, way: str) -> str:
    row = rows.get(way, {})
    if "per_pair" not in row:
        return ""
    pieces = [f"{row['pairs_per_second']:.2f} pairs and {row['tokens_per_second']:,.0f} tokens a second"]
    pieces.append(f"{100 * row['utilisation']:.0f} %")
    if "peak_bytes" in row:
        pieces.append(f"{row['peak_bytes'] / 1e6:,.0f} MB")
    measured = [name for name, each in rows.items() if "per_pair" in each]
    baseline = baseline_of(method, way, measured)
    if baseline not in (None, way):
        faster = ratios({name: rows[name]["per_pair"] for name in (baseline, way)}, baseline, way)
        pieces.append(f"**{faster['median']:.2f}** times as fast as {baseline}")
    return ", ".join(pieces)


def _where(result: dict[str, Any]) -> str:
    on, ceilings = result["machine"], result["ceilings"]
    packages = ", ".join(f"{name} {on['packages'][name]}" for name in ("torch", "transformers", "peft", "trl"))
    peak = f", {ceilings['data_sheet'] / 1e12:.0f} by its data sheet" if ceilings.get("data_sheet") else ""
    where = on["gpu"] if result["scale"] == "cuda" else f"{on['cpu']}, {on['threads']} threads"
    clock = ", processor time" if result["processor_time"] else ""
    state = "" if result["flash_linear_attention"] else " Qwen3.5's layers with a state run by transformers' PyTorch code."
    return (
        f"{where}, {packages}; {result['dtype']}, random weights{clock}.{state} 100 % is a large product of two matrices on it, "
        f"{ceilings['measured'] / 1e12:.2f} TFLOP/s{peak}."
    )
