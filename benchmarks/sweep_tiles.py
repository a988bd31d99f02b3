"""Tile sizes of the Triton kernels tried on the GPU at hand: what their tables of tiles are read from.

    python -m benchmarks.sweep_tiles --output tiles.json

Tree attention: causal 8k, head dim 128; one pass is varied at a time, the others keep the table's tiles. Rows of logits: few and many, of
152,064 in bfloat16, with their gradient. Kernels are compiled in as many processes as there are cores first.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.harness import CudaTimer, timed
from benchmarks.measure import machine, markdown
from benchmarks.ops.tree_attention import LLM, LONG, Problem, make
from mmdpo_kernels.backends.logit_options import LogitOptions
from mmdpo_kernels.backends.triton import logit_rows, runtime, tiles
from mmdpo_kernels.backends.triton import tree_attention as kernels

Tiles = tiles.Tiles
Candidate = tuple[int, int, int, int]
# Queries, keys, warps, stages; what others use on Hopper for head dim 128, and its neighbours.
CANDIDATES = {
    "forward": [
        (128, 64, 8, 3),
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (128, 64, 4, 3),
        (64, 64, 4, 3),
        (64, 128, 4, 3),
        (128, 32, 4, 4),
    ],
    "grad_key": [
        (64, 128, 8, 2),
        (64, 128, 8, 3),
        (32, 128, 4, 3),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (128, 64, 8, 2),
        (32, 64, 4, 4),
    ],
    "grad_query": [
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 32, 8, 3),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 128, 8, 2),
        (128, 128, 8, 2),
    ],
}
# Columns, warps, stages, registers a thread.
BLOCKS = [
    (2048, 8, 4, 64),
    (2048, 8, 2, 64),
    (2048, 8, 6, 64),
    (1024, 4, 4, 64),
    (1024, 8, 4, 64),
    (4096, 8, 3, 128),
    (4096, 16, 4, 64),
    (8192, 32, 3, 64),
]
ROWS = {"rows_200": 200, "rows_1024": 1024}
VOCABULARY = 152064
COMPILED_LENGTH = 1024
"""Long enough for every branch, short enough to cost nothing; the compiled kernels serve any multiple of 16."""


def problem_of(length: int) -> Problem:
    sizes = {**LLM, "length": length}
    return make(lambda sizes: [(sizes["length"], [])], timed="forward")(sizes, torch.device("cuda"), torch.bfloat16)


def table_tiles(problem: Problem) -> tiles.TreeAttentionTiles:
    """What the table says for the problem."""
    return tiles.choose(problem.query.shape[-1], problem.query.dtype, runtime.capability(problem.query.device), heavy=False)


def varied(which: str, candidate: Candidate, problem: Problem) -> AbstractContextManager[None]:
    """The table's tiles with those of one pass replaced."""
    kept = table_tiles(problem)
    passes = {name: getattr(kept, name) for name in CANDIDATES}
    return tiles.override(**{**passes, which: Tiles(*candidate)})


class Subject(Protocol):
    """What is timed under a candidate."""

    def one(self, which: str) -> Any: ...

    def varied(self, which: str, candidate: Candidate) -> AbstractContextManager[None]: ...

    def described(self, which: str, candidate: Candidate) -> dict[str, Any]:
        """The candidate by name, and whether it is the table's."""
        ...


class Passes:
    """Forward and backward of tree attention, without autograd in between."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.inputs = tuple(leaf.detach() for leaf in problem.leaves.values())
        self.options = (problem.tree_end, None, 0, problem.scale, None, None)
        self.grad = problem.grad_output
        self.output, self.lse, _ = self.forward()

    def forward(self) -> Any:
        return kernels.forward(*self.inputs, *self.options)

    def backward(self) -> Any:
        return kernels.backward(self.grad, None, None, *self.inputs, self.output, self.lse, *self.options)

    def one(self, which: str) -> Any:
        return self.forward() if which == "forward" else self.backward()

    def varied(self, which: str, candidate: Candidate) -> AbstractContextManager[None]:
        return varied(which, candidate, self.problem)

    def described(self, which: str, candidate: Candidate) -> dict[str, Any]:
        chosen = Tiles(*candidate)
        return {**asdict(chosen), "in_table": getattr(table_tiles(self.problem), which) == chosen}


class LogitRows:
    """Log-probabilities of rows of logits, and gradients in their place."""

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        self.logits = torch.randn(rows, vocabulary, device=device, dtype=torch.bfloat16)
        self.targets = torch.randint(vocabulary, (rows,), device=device)

    def one(self, which: str) -> Any:
        return logit_rows.fold_with_gradient(self.logits, self.targets, LogitOptions(None, 1.0, 1.0, -100), (), 1.0)

    def varied(self, which: str, candidate: Candidate) -> AbstractContextManager[None]:
        return logit_rows.override(logit_rows.Block(*candidate))

    def described(self, which: str, candidate: Candidate) -> dict[str, Any]:
        block = logit_rows.Block(*candidate)
        return {**block._asdict(), "in_table": block == logit_rows.block_of(self.logits.dtype, ())}


def subject_of(which: str, *, small: bool) -> Subject:
    """small: to compile for, of the same kernels."""
    if which in ROWS:
        return LogitRows(1 if small else ROWS[which], VOCABULARY, torch.device("cuda"))
    return Passes(problem_of(COMPILED_LENGTH if small else LONG["cuda"]["length"]))


def candidates() -> dict[str, list[Candidate]]:
    """By pass."""
    return {**CANDIDATES, **dict.fromkeys(ROWS, BLOCKS)}


def compile_one(which: str, candidate: Candidate) -> str:
    """Fill Triton's cache on disk; returns why the tiles cannot run, or nothing."""
    try:
        subject = subject_of(which, small=True)
        with subject.varied(which, candidate):
            subject.one(which)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - too much shared memory, too many registers: for the table
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def sweep(seconds: float) -> list[dict[str, Any]]:
    """Milliseconds by pass and tiles."""
    end = time.monotonic() + seconds
    wanted = [(which, candidate) for which, several in candidates().items() for candidate in several]
    problems: dict[tuple[str, Candidate], str] = {one: "not compiled in time" for one in wanted}
    pool = ProcessPoolExecutor(min(len(wanted), os.cpu_count() or 1), mp_context=get_context("spawn"))
    try:
        waiting = {pool.submit(compile_one, *one): one for one in wanted}
        for done in as_completed(waiting, timeout=max(1.0, 0.8 * seconds)):
            problems[waiting[done]] = done.result()
    except TimeoutError:
        pass
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    device = torch.device("cuda")
    timer, subjects = CudaTimer(device), {which: subject_of(which, small=False) for which in ("forward", *ROWS)}
    rows = []
    for which, candidate in wanted:
        subject = subjects.get(which, subjects["forward"])
        row: dict[str, Any] = {"pass": which, **subject.described(which, candidate)}
        why = problems[which, candidate] or ("out of time" if time.monotonic() > end else "")
        if why:
            rows.append({**row, "reason": why})
            continue
        call = partial(subject.one, which)
        with subject.varied(which, candidate):
            whole = min(timed(call, device) for _ in range(3))
            took = [timer.seconds(call, whole) for _ in range(5)]
        rows.append({**row, "seconds": took, "milliseconds": 1e3 * sorted(took)[len(took) // 2]})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, the fastest of each pass first."""
    ordered = sorted(rows, key=lambda row: (list(candidates()).index(row["pass"]), row.get("milliseconds", float("inf"))))
    header = ["pass", "queries", "keys or columns", "warps", "stages", "registers", "ms of forward, backward or rows", ""]
    return markdown(
        header,
        [
            [
                row["pass"],
                str(row.get("block_m", "")),
                str(row.get("block_n", row.get("columns"))),
                *(str(row.get(name, "")) for name in ("num_warps", "num_stages", "registers")),
                f"{row['milliseconds']:.3f}" if "milliseconds" in row else row["reason"],
                "in the table" if row["in_table"] else "",
            ]
            for row in ordered
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the figures go as JSON")
    parser.add_argument("--seconds", type=float, default=300.0, help="begin nothing new after this many seconds")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("sweep_tiles: it needs a GPU, and there is none")
    rows = sweep(arguments.seconds)
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
