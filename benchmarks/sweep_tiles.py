"""Tile sizes of the Triton tree attention tried on the GPU at hand, causal 8k, head dim 128: what its table of tiles is read from.

    python -m benchmarks.sweep_tiles --output tiles.json

One pass is varied at a time, the others keep the table's tiles. Kernels are compiled in as many processes as there are cores first.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import CudaTimer, timed
from benchmarks.measure import machine, markdown
from benchmarks.ops.tree_attention import LLM, LONG, Problem, make
from mmdpo_kernels.backends.triton import runtime, tiles
from mmdpo_kernels.backends.triton import tree_attention as kernels

Tiles = tiles.Tiles
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
COMPILED_LENGTH = 1024
"""Long enough for every branch, short enough to cost nothing; the compiled kernels serve any multiple of 16."""


def problem_of(length: int) -> Problem:
    sizes = {**LLM, "length": length}
    return make(lambda sizes: [(sizes["length"], [])], timed="forward")(sizes, torch.device("cuda"), torch.bfloat16)


def table_tiles(problem: Problem) -> tiles.TreeAttentionTiles:
    """What the table says for the problem."""
    return tiles.choose(problem.query.shape[-1], problem.query.dtype, runtime.capability(problem.query.device), heavy=False)


def varied(which: str, candidate: tuple[int, int, int, int], problem: Problem) -> AbstractContextManager[None]:
    """The table's tiles with those of one pass replaced."""
    kept = table_tiles(problem)
    passes = {name: getattr(kept, name) for name in CANDIDATES}
    return tiles.override(**{**passes, which: Tiles(*candidate)})


class Passes:
    """Forward and backward of a problem, without autograd in between."""

    def __init__(self, problem: Problem) -> None:
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


def compile_one(which: str, candidate: tuple[int, int, int, int]) -> str:
    """Fill Triton's cache on disk; returns why the tiles cannot run, or nothing."""
    try:
        problem = problem_of(COMPILED_LENGTH)
        passes = Passes(problem)
        with varied(which, candidate, problem):
            passes.one(which)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - too much shared memory, too many registers: for the table
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def sweep(seconds: float) -> list[dict[str, Any]]:
    """Milliseconds by pass and tiles, the table's own first."""
    end = time.monotonic() + seconds
    wanted = [(which, candidate) for which, candidates in CANDIDATES.items() for candidate in candidates]
    problems: dict[tuple[str, tuple[int, int, int, int]], str] = {one: "not compiled in time" for one in wanted}
    pool = ProcessPoolExecutor(min(len(wanted), os.cpu_count() or 1), mp_context=get_context("spawn"))
    try:
        waiting = {pool.submit(compile_one, *one): one for one in wanted}
        for done in as_completed(waiting, timeout=max(1.0, 0.8 * seconds)):
            problems[waiting[done]] = done.result()
    except TimeoutError:
        pass
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    problem = problem_of(LONG["cuda"]["length"])
    passes, timer, chosen = Passes(problem), CudaTimer(problem.query.device), table_tiles(problem)
    rows = []
    for which, candidate in wanted:
        row: dict[str, Any] = {
            "pass": which,
            **asdict(Tiles(*candidate)),
            "in_table": getattr(chosen, which) == Tiles(*candidate),
        }
        why = problems[which, candidate] or ("out of time" if time.monotonic() > end else "")
        if why:
            rows.append({**row, "reason": why})
            continue
        with varied(which, candidate, problem):
            whole = min(timed(lambda which=which: passes.one(which), problem.query.device) for _ in range(3))
            took = [timer.seconds(lambda which=which: passes.one(which), whole) for _ in range(5)]
        rows.append({**row, "seconds": took, "milliseconds": 1e3 * sorted(took)[len(took) // 2]})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, the fastest of each pass first."""
    ordered = sorted(rows, key=lambda row: (list(CANDIDATES).index(row["pass"]), row.get("milliseconds", float("inf"))))
    header = ["pass", "queries", "keys", "warps", "stages", "ms of forward or backward", ""]
    return markdown(
        header,
        [
            [
                row["pass"],
                *(str(row[name]) for name in ("block_m", "block_n", "num_warps", "num_stages")),
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
