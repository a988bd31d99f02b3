"""The one table of README.md: a row or two from each committed result file.

`python -m benchmarks --tables` writes it, and so does every command that measures one of its rows.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.kernels.goals import TRL, Entry, Missing, Result, fastest, plain, speed_up
from benchmarks.runs.mia_dpo_seeds import BASE, MAIN, accuracies, multi

PAGE, SECTION = "README.md", "results"
COLUMNS = ["what", "against", "result", "again by `python -m`"]
FILES = ("training_step_cpu", "attention_ratio_cpu", "ops_cpu", "mia_dpo_seeds")
NOT_MEASURED = "not measured"


def write() -> Path:
    """The section of README.md, from the committed results alone. Returns the page."""
    found = {name: _read(name) for name in FILES}
    measure.write_section(PAGE, SECTION, text_of(found))
    return measure.ROOT / PAGE


def text_of(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: the table, and what it was measured on. found: result files by name, empty where there is none."""
    rows = [
        *_steps(found["training_step_cpu"]),
        _ratios(found["attention_ratio_cpu"]),
        *_kernels(found["ops_cpu"]),
        _accuracy(found["mia_dpo_seeds"]),
    ]
    return f"{measure.markdown(COLUMNS, rows)}\n\n{_machines(found)}"


def _steps(result: dict[str, Any]) -> list[list[str]]:
    trl = result["machine"]["packages"]["trl"] if result else ""
    rows = []
    for method, what, against in (
        (
            "dpo",
            "DPO training step without checkpointing, five pictures, 1,024 + 40 tokens",
            f"TRL {trl} `DPOTrainer`, same settings",
        ),
        ("mdpo", "mDPO training step, the same data", "mDPO's official way"),
    ):
        measured = method in result and "memory" in result
        faster = (
            _faster(result[method]["speed_up"]["plain"], result["memory"]["share"][method]["plain"]) if measured else NOT_MEASURED
        )
        rows.append([what, against, faster, "`benchmarks.runs.training_step`"])
    return rows


def _ratios(result: dict[str, Any]) -> list[str]:
    faster = _faster(result["speed_up"]["score"], result["memory_share"]["score"]) if result else NOT_MEASURED
    what = "attention ratio of an answer, five pictures, 1,500 + 40 tokens"
    return [what, "eager attention maps", faster, "`benchmarks.runs.attention_ratio`"]


def _kernels(content: dict[str, Any]) -> list[list[str]]:
    def over(op: str, case: str, peer: str | None) -> str:
        try:
            entry = Result(content or {"cases": []}).entry(op, case)
            slow = peer or fastest(entry, plain, "plain attention")
            return _faster(speed_up(entry, slow, "auto"), _share(entry, slow))
        except Missing:
            return NOT_MEASURED

    pair, head = ("tree_attention", "pair"), ("linear_logprobs", "frozen_32k_200")
    return [
        [
            "attention of a pair, 1,500 + 2 x 60 tokens, forward + backward",
            "PyTorch's SDPA on both sequences",
            over(*pair, None),
            _command(*pair),
        ],
        [
            "frozen head, 200 rows of 32k tokens, float32, forward + backward",
            "TRL's head as its trainer calls it",
            over(*head, TRL),
            _command(*head),
        ],
    ]


def _command(op: str, case: str) -> str:
    return f"`benchmarks {op} --case {case}`"


def _share(entry: Entry, slow: str) -> float | None:
    ours, theirs = (entry["contestants"][name].get("peak_bytes") for name in ("auto", slow))
    return ours / theirs if ours is not None and theirs else None


def _faster(speed: dict[str, float], share: float | None) -> str:
    memory = "" if share is None else f"; {100 * share:.0f} % of the peak memory"
    return f"{speed['median']:.2f} times as fast ({speed['min']:.2f} to {speed['max']:.2f}){memory}"


def _accuracy(result: dict[str, Any]) -> list[str]:
    seeds = [accuracies(summary) for summary in result["summaries"].values()] if result else []
    means = {arm: statistics.fmean(multi(found[arm]) for found in seeds) for arm in (seeds[0] if seeds else ())}
    against, found = "no training", NOT_MEASURED
    if means:
        controls = [mean for arm, mean in means.items() if arm not in (BASE, MAIN)]
        against = f"no training: {means[BASE]:.2f}"
        found = f"{means[MAIN]:.2f}; its control arms {min(controls):.2f} to {max(controls):.2f}"
    what = f"MIA-DPO on the built-in world: multi-image accuracy, mean of {len(seeds)} seeds"
    return [what, against, found, "`benchmarks.runs.mia_dpo_seeds`"]


def _machines(found: dict[str, dict[str, Any]]) -> str:
    machines = [result["machine"] for result in found.values() if result]
    names = dict.fromkeys(f"{on['cpu']}, {on['threads']} threads, torch {on['packages']['torch']}" for on in machines)
    models = "steps and ratios on small LLaVAs of random weights, float32"
    return f"Measured on {'; '.join(names)}; {models}." if names else "Nothing is measured yet."


def _read(name: str) -> dict[str, Any]:
    path = measure.RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
