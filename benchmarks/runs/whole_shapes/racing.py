"""Measures ways to train: real `train()` loops, a step each in turn; what fails says why and the others go on."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from transformers import Trainer
from transformers.utils import logging

from benchmarks.kernels.harness import synchronise
from benchmarks.measure import peak_memory
from benchmarks.runs.training_step.sides import MDPO, Subject, loss_of, reference_pass, trainer_of, warm
from benchmarks.runs.training_step.stepping import Loop
from benchmarks.runs.whole_shapes.cases import WAYS, Way
from benchmarks.runs.whole_shapes.flops import Weights, form_of, step_flops
from benchmarks.runs.whole_shapes.subject import Shape
from mmdpo_kernels import tree_refusal
from mmdpo_trainers.training.batches.collator import collator_of
from mmdpo_trainers.training.config import PreferenceConfig
from mmdpo_trainers.training.trainer import PreferenceTrainer

TERMS = {"dpo": 1, "mdpo": 3}
START = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""How far a loss may be from that many log 2 before the first step."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """How to measure."""

    device: torch.device
    repeats: int
    progress: Callable[[str], None]
    clock: Callable[[], float] = time.perf_counter


def race(bench: Bench, shape: Shape, method: str, names: Sequence[str]) -> dict[str, Row]:
    """Rows of these ways: `seconds_per_pair` and what follows from them, or under `reason` or `failed` why there are none."""
    ways = {name: WAYS[method][name] for name in names}
    rows: dict[str, Row] = {name: {} for name in names}
    trainers: dict[str, Trainer] = {}
    for name, way in ways.items():
        reason = way.reason(shape.name, bench.device)
        if reason is not None:
            rows[name] = {"reason": reason}
            continue
        with _answered(rows[name], bench.progress, name):
            trainers[name] = _trainer(way, shape.subject(method))
            _check_start(name, trainers[name], method, shape.dtype)
    with contextlib.ExitStack() as stack:
        loops = {name: stack.enter_context(Loop(trainer)) for name, trainer in trainers.items() if not rows[name]}
        _take_turns(bench, ways, loops, rows, len(trainers) == 1)
    # What is left of them on a GPU would be the next ones' memory.
    trainers.clear()
    loops.clear()
    forms, refusal = _forms(shape, method), tree_refusal(shape.model)
    weights = Weights.of(shape.model, shape.family, shape.size, shape.size.rank(method))
    for name, way in ways.items():
        if "seconds" in rows[name]:
            packs = way.packs and refusal is None
            rows[name] |= _figures(rows[name], way, forms[packs], forms[False], weights, shape.size.pictures)
            if way.packs and not packs:
                rows[name]["note"] = f"it ran as padded rows, as {refusal}"
            bench.progress(f"{shape.name} {method} {name}: {rows[name]['seconds_per_pair']:.3f} s a pair")
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


@contextlib.contextmanager
def _answered(row: Row, progress: Callable[[str], None], name: str) -> Any:
    """An error is the row's answer."""
    try:
        yield
    except torch.OutOfMemoryError:
        row.clear()
        row["reason"] = "it needs more memory than the GPU has"
    except Exception as error:  # noqa: BLE001 - a peer may fail in any way, the others go on
        cause = error.__cause__ or error
        row.clear()
        if isinstance(cause, torch.OutOfMemoryError):
            row["reason"] = "it needs more memory than the GPU has"
        else:
            row["failed"] = f"{type(cause).__name__}: {cause}".splitlines()[0][:300]
            progress(f"{name} failed: {row['failed']}")


def _trainer(way: Way, subject: Subject) -> Trainer:
    own_modules = subject.model
    return trainer_of(way.side, dataclasses.replace(subject, model=lambda: way.prepared(own_modules())))


def _check_start(name: str, trainer: Trainer, method: str, dtype: torch.dtype) -> None:
    """The loss is so many log 2 where policy and reference agree; then the adapter is moved off that point."""
    if isinstance(trainer, PreferenceTrainer):
        trainer.precompute_reference()
    loss, terms = loss_of(trainer, [0]), TERMS[method]
    if not abs(loss - terms * math.log(2)) < START[dtype] * terms:
        raise ValueError(f"{name}: loss {loss} at the start, expected {terms} log 2")
    if trainer.args.use_cpu:
        # Drawn on the CPU, so that all have the same; on a GPU the billions of whole shapes would take longer than the steps.
        warm(trainer.model)  # type: ignore[arg-type]


def _take_turns(bench: Bench, ways: Mapping[str, Way], loops: Mapping[str, Loop], rows: dict[str, Row], alone: bool) -> None:
    """Seconds of each loop's steps and of its passes of the reference, in turn; the first turn warms up.

    alone: whether the memory of the GPU is this way's.
    """
    on_gpu = bench.device.type == "cuda"
    if on_gpu and alone:
        torch.cuda.reset_peak_memory_stats(bench.device)
    for turn in range(bench.repeats + 1):
        for name, loop in loops.items():
            if "reason" in rows[name] or "failed" in rows[name]:
                continue
            with _answered(rows[name], bench.progress, name), ways[name].kernels():
                taken = {"seconds": _timed(bench, loop.step)}
                if ways[name].side.caches:
                    taken["reference_seconds"] = _timed(bench, lambda loop=loop: reference_pass(loop.trainer, 1))  # type: ignore[misc]
                for kind, value in taken.items() if turn else ():
                    rows[name].setdefault(kind, []).append(value)
                if on_gpu and alone:
                    rows[name]["peak_bytes"] = torch.cuda.max_memory_allocated(bench.device)


def _timed(bench: Bench, call: Callable[[], Any]) -> float:
    synchronise(bench.device)
    start = bench.clock()
    call()
    synchronise(bench.device)
    return bench.clock() - start


def _forms(shape: Shape, method: str) -> dict[bool, Any]:
    """A record as a tree (True) and as padded rows, as our collator makes it."""
    config = PreferenceConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", loss_type=_losses(method))
    data = shape.records(method)
    return {
        packs: collator_of(shape.model, shape.processor, config, data, tree_packing=packs)([data[0]])["batch"]
        for packs in (True, False)
    }


def _losses(method: str) -> list[str]:
    return MDPO if method == "mdpo" else ["sigmoid"]


def _figures(row: Row, way: Way, batch: Any, separate: Any, weights: Weights, shown: int) -> Row:
    """What follows from the seconds of a step. batch: a record in the form that was run. separate: as padded rows."""
    pictures, reference_pictures = way.pictures(shown, len(batch.pictures.tokens), batch.lengths.shape[1])
    form = form_of(batch, pictures=pictures, reference_pictures=reference_pictures)
    apart = form_of(separate, pictures=0, reference_pictures=0)
    passes = row.get("reference_seconds", [0.0] * len(row["seconds"]))
    each = [step + way.reference * one if way.side.caches else step for step, one in zip(row["seconds"], passes, strict=True)]
    median, flops = statistics.median(each), step_flops(weights, form, reference=way.reference)
    return {
        "per_pair": each,
        "seconds_per_pair": median,
        "pairs_per_second": 1 / median,
        "tokens": form.tokens,
        "tokens_per_second": apart.tokens / median,
        "flops": flops,
        "flops_per_second": flops / median,
    }


def quiet() -> None:
    """No notices of libraries: each of the trainers would bring them again."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def peak_of(name: str, scale: str, method: str, way: str) -> int:
    """Peak bytes above the model of a first step on the CPU, in a process in which nothing has run before."""
    quiet()
    shape = Shape(name, scale, torch.device("cpu"), torch.float32)
    subject = shape.subject(method)
    subject = dataclasses.replace(subject, data=subject.data.select([0]))
    with Loop(_trainer(WAYS[method][way], subject)) as loop:
        return peak_memory(loop.step)


def fresh_peaks(cases: Sequence[tuple[str, str, str, str]], progress: Callable[[str], None]) -> list[int]:
    """`peak_of` of each, in a process of its own: forked from one that has imported everything and done nothing."""
    # Blocks of their own go back at once, as in an allocator made for tensors.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 18)
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    found = []
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for case in cases:
            found.append(pool.submit(peak_of, *case).result())
            progress(f"{' '.join(case)}: peak {found[-1] / 1e6:.0f} MB")
    return found
