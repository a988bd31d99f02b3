"""Tile sizes of the Triton kernels tried on the GPU at hand: what their tables of tiles are read from.

    python -m benchmarks.kernels.sweep_tiles --output FOLDER             # tiles.json in it
    python -m benchmarks.kernels.sweep_tiles --small --device cpu        # a candidate a pass, interpreted, to see that everything runs

Tree attention: causal 8k, head dim 128; one pass is varied at a time, the others keep the table's tiles. Rows of logits: few and many, of
152,064 in bfloat16, with their gradient. Kernels are compiled in as many processes as there are cores first.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any, Protocol

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from benchmarks.kernels.harness import CudaTimer, timed
from benchmarks.kernels.ops.tree_attention import LLM, LONG, TINY, Problem, make
from benchmarks.measure import add_place, markdown, place_of
from mmdpo_kernels.backends.calls import TreeAttentionCall
from mmdpo_kernels.backends.logit_options import LogitOptions
from mmdpo_kernels.backends.triton import logit_rows, logit_rows_tiles, runtime
from mmdpo_kernels.backends.triton import tree_attention as kernels
from mmdpo_kernels.backends.triton import tree_attention_tiles as tiles

Tiles = tiles.Tiles
Candidate = tuple[int, ...]
# Queries, keys, warps, stages; what others use on Hopper for head dim 128, and its neighbours; then the variants.
CANDIDATES: dict[str, list[Candidate]] = {
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
for _name, _variants in tiles.CANDIDATES.items():
    CANDIDATES[_name] += [astuple(each) for each in _variants]
# The table's first.
BLOCKS = [tuple(each) for each in (logit_rows_tiles.block_of(torch.bfloat16, ()), *logit_rows_tiles.CANDIDATES)]
ROWS = {"rows_200": 200, "rows_1024": 1024}
VOCABULARY = 152064
COMPILED_LENGTH = 1024
"""Long enough for every branch, short enough to cost nothing; the compiled kernels serve any multiple of 16."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Inputs of every pass, and how many of its candidates are tried."""

    device: str = "cuda"
    attention: Mapping[str, int]
    rows: Mapping[str, int]
    vocabulary: int = VOCABULARY
    most: int | None = None


FULL = Size(attention=LONG["cuda"], rows=ROWS)
COMPILED = Size(attention={**LLM, "length": COMPILED_LENGTH}, rows=dict.fromkeys(ROWS, 1))
"""To compile for, of the same kernels."""
SMALL = Size(attention={**TINY, "length": 32}, rows=dict.fromkeys(ROWS, 2), vocabulary=96, most=1)
"""To see that everything runs."""


def problem_of(size: Size) -> Problem:
    forest = make(lambda sizes: [(sizes["length"], [])], timed="forward")
    return forest(size.attention, torch.device(size.device), torch.bfloat16)


def table_tiles(problem: Problem) -> tiles.TreeAttentionTiles:
    """What the table says for the problem."""
    return tiles.choose(problem.query.shape[-1], problem.query.dtype, runtime.capability(problem.query.device))


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
        self.call = TreeAttentionCall(problem.tree_end, None, 0, problem.scale, softcap=None, window=None)
        self.grad = problem.grad_output
        self.output, self.lse, _ = self.forward()

    def forward(self) -> Any:
        return kernels.forward(*self.inputs, self.call)

    def backward(self) -> Any:
        return kernels.backward(self.grad, None, None, *self.inputs, self.output, self.lse, self.call)

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
        return logit_rows_tiles.override(logit_rows_tiles.Block(*candidate))

    def described(self, which: str, candidate: Candidate) -> dict[str, Any]:
        block = logit_rows_tiles.Block(*candidate)
        return {
            "rows": len(self.logits),
            **block._asdict(),
            "in_table": block == logit_rows_tiles.block_of(self.logits.dtype, ()),
        }


def subject_of(which: str, size: Size) -> Subject:
    if which in ROWS:
        return LogitRows(size.rows[which], size.vocabulary, torch.device(size.device))
    return Passes(problem_of(size))


def candidates() -> dict[str, list[Candidate]]:
    """By pass."""
    return {**CANDIDATES, **dict.fromkeys(ROWS, BLOCKS)}


def compile_one(which: str, candidate: Candidate) -> str:
    """Fill Triton's cache on disk; returns why the tiles cannot run, or nothing."""
    try:
        subject = subject_of(which, COMPILED)
        with subject.varied(which, candidate):
            subject.one(which)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - too much shared memory, too many registers: for the table
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def compile_all(wanted: Sequence[tuple[str, Candidate]], seconds: float) -> dict[tuple[str, Candidate], str]:
    """Why each cannot run, or nothing."""
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
    return problems


def sweep(seconds: float, size: Size = FULL) -> list[dict[str, Any]]:
    """Milliseconds by pass and tiles."""
    end = time.monotonic() + seconds
    wanted = [(which, candidate) for which, several in candidates().items() for candidate in several[: size.most]]
    problems = dict.fromkeys(wanted, "") if size.most else compile_all(wanted, seconds)
    device = torch.device(size.device)
    subjects = {which: subject_of(which, size) for which in ("forward", *ROWS)}
    seconds_of = _timer(device)
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
            took = seconds_of(call)
        rows.append({**row, "seconds": took, "milliseconds": 1e3 * sorted(took)[len(took) // 2]})
    return rows


def _timer(device: torch.device) -> Callable[[Callable[[], Any]], list[float]]:
    """Seconds of a call, several times."""
    if device.type == "cpu":
        return lambda call: [timed(call, device)]
    timer = CudaTimer(device)

    def several(call: Callable[[], Any]) -> list[float]:
        whole = min(timed(call, device) for _ in range(3))
        return [timer.seconds(call, whole) for _ in range(5)]

    return several


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, the fastest of each pass first."""
    ordered = sorted(rows, key=lambda row: (list(candidates()).index(row["pass"]), row.get("milliseconds", float("inf"))))
    header = [
        "pass",
        "queries",
        "keys or columns",
        "warps",
        "stages",
        "registers",
        "variant",
        "ms of forward, backward or rows",
        "",
    ]
    return markdown(
        header,
        [
            [
                row["pass"],
                str(row.get("block_m", "")),
                str(row.get("block_n", row.get("columns"))),
                *(str(row.get(name, "")) for name in ("num_warps", "num_stages", "registers")),
                " ".join(name for name in ("descriptors", "specialize", "overlap", "keep") if row.get(name)),
                f"{row['milliseconds']:.3f}" if "milliseconds" in row else row["reason"],
                "in the table" if row["in_table"] else "",
            ]
            for row in ordered
        ],
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: with --small only, interpreted")
    add_place(parser)
    parser.add_argument("--seconds", type=float, default=300.0, help="begin nothing new after this many seconds")
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu" and not arguments.small:
        parser.error("--device cpu: tiles of interpreted kernels have no speed; add --small to see that they run")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("sweep_tiles: it needs a GPU, and there is none")
    size = replace(SMALL, device=arguments.device) if arguments.small else FULL
    rows = sweep(arguments.seconds, size)
    print(f"{table(rows)}\nwritten: {place_of(arguments).result('tiles', {'rows': rows})}")


if __name__ == "__main__":
    main()
