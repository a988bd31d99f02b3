"""The tables of docs/installing.md, from the committed results alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.measure import markdown


def wheels_table(result: Mapping[str, Any]) -> str:
    """Markdown: a row a wheel. result: what `make wheels` has written."""
    rows = [
        [
            f"{row['python']}, " + ("CPU" if row["cuda"] is None else f"CUDA {row['cuda']}"),
            f"`{row['file']}`",
            f"{row['bytes'] / 2**20:.1f} MiB",
            f"{row['seconds'] / 60:.1f} min",
            ", ".join(row["cuda_targets"]) or "none",
        ]
        for row in result["wheels"]
    ]
    left_out = sorted({name for row in result["wheels"] for name in row["left_out"]})
    unknown = f" This nvcc does not know {', '.join(left_out)}." if left_out else " No target was left out by this nvcc."
    machine = result["machine"]
    said = (
        f"Built on {machine['cpu']}, {result['processors']} processors that other work shared, from `{result['sdist']['file']}` "
        f"({result['sdist']['bytes'] / 2**20:.1f} MiB). auditwheel calls all of them {_platforms(result)}."
    )
    return f"{markdown(['Python, kind', 'file', 'size', 'build', 'code for GPUs'], rows)}\n\n{said}{unknown}"


def _platforms(result: Mapping[str, Any]) -> str:
    return ", ".join(sorted({row["platform"] for row in result["wheels"]}))


def versions_table(result: Mapping[str, Any]) -> str:
    """Markdown: a row an environment, with its tests or the reason why there are none. result: what `make versions` has written."""
    header = ["environment", "Python", "torch", "triton", "transformers", "peft", "accelerate", "what ran", "outcome"]
    rows = []
    for row in result["rows"]:
        versions = [row["versions"].get(name, "") for name in header[2:7]]
        rows.append([row["name"], row["python"], *versions, ", ".join(row["suites"]), _outcome(row)])
    machine = result["machine"]
    return f"{markdown(header, rows)}\n\nRun on {machine['cpu']}, without a GPU."


def _outcome(row: Mapping[str, Any]) -> str:
    if row["state"] == "not run":
        return f"not run here: {row['note']}"
    if row["state"] == "failed":
        return "failed"
    skipped = f", {row['tests']['skipped']} skipped" if row["tests"]["skipped"] else ""
    return f"{row['tests']['passed']} passed{skipped}, {row['seconds']} s"
