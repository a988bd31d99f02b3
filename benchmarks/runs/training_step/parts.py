"""The measurements. Each part returns what goes into the result file."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.measure import alternate, peak_memory, ratios
from benchmarks.runs.training_step import limits
from benchmarks.runs.training_step.setting import Setting
from benchmarks.runs.training_step.sides import (
    EPOCHS,
    MDPO,
    Side,
    cached_records,
    check_agreement,
    make,
    ours,
    reference_pass,
    warm,
)
from benchmarks.runs.training_step.stepping import Loop

Seconds = dict[str, list[float]]
"""Per side, seconds a pair of each turn."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """How to measure."""

    setting: Setting
    repeats: int
    progress: Callable[[str], None]
    clock: Callable[[], float] = time.perf_counter
    small: bool = False
    """Whether all that is asked for is that it runs: memory is then measured in this process, and a side's best setting is one of them."""

    def race(
        self, sides: Mapping[str, Side], setting: Setting, *, repeats: int | None = None, terms: int | None = None
    ) -> Seconds:
        """Train with all sides in turn; a side that caches its reference is charged its share of that pass.

        terms: how many log 2 the loss starts from; it is checked, and that all sides have one loss. None: no check.
        """
        trainers = {name: make(side, setting) for name, side in sides.items()}
        if terms is None:
            for trainer in trainers.values():
                warm(trainer.model)  # type: ignore[arg-type]
        else:
            check_agreement(trainers, terms)
        with contextlib.ExitStack() as stack:
            functions: dict[str, Callable[[], None]] = {}
            for name, side in sides.items():
                functions[name] = stack.enter_context(Loop(trainers[name])).step
                if side.caches:
                    functions[_pass(name)] = functools.partial(reference_pass, trainers[name], cached_records(side, setting))
            seconds = alternate(functions, self.repeats if repeats is None else repeats, self.progress, clock=self.clock)
        found = {}
        for name, side in sides.items():
            found[name] = [value / side.batch for value in seconds[name]]
            if side.caches:
                share = 1 / (EPOCHS * cached_records(side, setting))
                found[name] = [step + share * one for step, one in zip(found[name], seconds[_pass(name)], strict=True)]
        return found


def _pass(name: str) -> str:
    return f"{name}: reference pass"


BUDGET_BATCH = 4
"""The memory budget of the best settings is what the baseline needs with gradient checkpointing (TRL's default) at this batch size."""

DPO = {
    "TRL": Side(kind="trl"),
    "TRL, checkpointing": Side(kind="trl", checkpointing=True),
    "ours": ours(),
    "ours, checkpointing": ours(checkpointing=True),
}
MDPO_SIDES = {
    "official": Side(kind="official"),
    "official, response rows": Side(kind="official rows"),
    "official, response rows, checkpointing": Side(kind="official rows", checkpointing=True),
    "ours": ours(loss_type=MDPO),
    "ours, checkpointing": ours(loss_type=MDPO, checkpointing=True),
}


def dpo(bench: Bench) -> dict[str, Any]:
    """The same settings on both sides."""
    seconds = bench.race(DPO, bench.setting, terms=1)
    against = {"plain": ("TRL", "ours"), "checkpointing": ("TRL, checkpointing", "ours, checkpointing")}
    return _compared(seconds, limits.of_sides(DPO, bench.setting), against)


def mdpo(bench: Bench) -> dict[str, Any]:
    """The same settings on both sides, the faster kind of logits for the official trainer."""
    setting = bench.setting.but(corrupted=True)
    seconds = bench.race(MDPO_SIDES, setting, terms=3)
    fastest = min(("official", "official, response rows"), key=lambda name: sum(seconds[name]))
    against = {"plain": (fastest, "ours"), "checkpointing": ("official, response rows, checkpointing", "ours, checkpointing")}
    return {**_compared(seconds, limits.of_sides(MDPO_SIDES, setting), against), "baseline": fastest}


def _compared(seconds: Seconds, flop: Mapping[str, float], against: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Seconds, products and, for each kind of comparison (the baseline, ours), the ratio of both."""
    return {
        "seconds_per_pair": seconds,
        "flop_per_pair": dict(flop),
        "speed_up": {kind: ratios(seconds, *sides) for kind, sides in against.items()},
        "limit": {kind: flop[theirs] / flop[own] for kind, (theirs, own) in against.items()},
    }


def memory(bench: Bench) -> dict[str, Any]:
    """Peak bytes above the model of one step, each in a fresh process, the reference pass over its records included."""
    found: dict[str, Any] = {}
    for method, sides in _candidates().items():
        setting = bench.setting.but(corrupted=method == "mdpo")
        found[method] = {name: _memory(side, setting.but(records=side.batch), bench) for name, side in sides.items()}
    shares = {
        "dpo": {
            "plain": _share(found["dpo"], "TRL", "ours"),
            "checkpointing": _share(found["dpo"], "TRL, checkpointing", "ours, checkpointing"),
        },
        "mdpo": {
            "plain": _share(found["mdpo"], "official, response rows", "ours"),
            "checkpointing": _share(found["mdpo"], "official, response rows, checkpointing", "ours, checkpointing"),
        },
    }
    return {"peak_bytes_above_model": found, "share": shares}


def best(bench: Bench, peaks: dict[str, Any]) -> dict[str, Any]:
    """Each side at the fastest of its settings that fit the memory budget, told by one turn of all. peaks: what `memory` found."""
    found: dict[str, Any] = {}
    for method, sides in _candidates().items():
        peak, setting = peaks["peak_bytes_above_model"][method], bench.setting.but(corrupted=method == "mdpo")
        budget = peak[_budget_side(method)]
        fitting = {name: side for name, side in sides.items() if peak[name] <= budget}
        if bench.small:
            fitting = {name: sides[name] for name in (_budget_side(method), "ours")}
        tried = bench.race(fitting, setting, repeats=1)
        own, other = ({name: tried[name] for name in tried if name.startswith("ours") == mine} for mine in (True, False))
        fastest = {group: min(times, key=lambda name: sum(times[name])) for group, times in (("ours", own), ("baseline", other))}
        pair = (fastest["baseline"], fastest["ours"])
        chosen = {name: sides[name] for name in pair}
        found[method] = {
            "budget_bytes": budget,
            "tried_seconds_per_pair": tried,
            "settings": fastest,
            **_compared(bench.race(chosen, setting), limits.of_sides(chosen, setting), {"best": pair}),
        }
    return found


def _budget_side(method: str) -> str:
    return f"{'TRL' if method == 'dpo' else 'official, response rows'}, checkpointing, batch {BUDGET_BATCH}"


def _candidates() -> dict[str, dict[str, Side]]:
    more = {
        "dpo": {"ours, batch 2": ours(batch=2), "ours, checkpointing, batch 4": ours(batch=4, checkpointing=True)},
        "mdpo": {"ours, batch 2": ours(batch=2, loss_type=MDPO)},
    }
    sides = {"dpo": DPO, "mdpo": {name: side for name, side in MDPO_SIDES.items() if name != "official"}}
    kinds = {"dpo": "trl", "mdpo": "official rows"}
    return {
        method: {
            **sides[method],
            _budget_side(method): Side(kind=kinds[method], batch=BUDGET_BATCH, checkpointing=True),
            **more[method],
        }
        for method in sides
    }


def questions(bench: Bench) -> dict[str, Any]:
    """Four questions about each set of pictures, in batches of four."""
    setting = bench.setting.but(questions=4)
    sides = {"TRL": Side(kind="trl", batch=4), "ours": ours(batch=4, group_by_pictures=True)}
    seconds = bench.race(sides, setting, terms=1)
    return _compared(seconds, limits.of_sides(sides, setting), {"questions": ("TRL", "ours")})


PICTURES, TOKENS, BATCHES = (1, 8), (20, 400), (4,)
"""Five pictures, 40 tokens and a batch of one are `dpo`."""


def growth(bench: Bench) -> list[dict[str, Any]]:
    """One size changed at a time."""
    pictures, tokens, batches = ((1,), (2,), (2,)) if bench.small else (PICTURES, TOKENS, BATCHES)
    points = [
        *(("pictures", count, {"pictures": count}, 1) for count in pictures),
        *(("response tokens", count, {"response_tokens": count}, 1) for count in tokens),
        *(("batch", batch, {"records": max(batch, 4)}, batch) for batch in batches),
    ]
    rows = []
    for what, value, changes, batch in points:
        # Batches of separate sequences do not fit without checkpointing.
        checkpointing, setting = what == "batch", bench.setting.but(**changes)
        sides = {
            "TRL": Side(kind="trl", batch=batch, checkpointing=checkpointing),
            "ours": ours(batch=batch, checkpointing=checkpointing),
        }
        compared = _compared(bench.race(sides, setting), limits.of_sides(sides, setting), {"growth": ("TRL", "ours")})
        rows.append({"what": what, "value": value, **compared})
    return rows


def features(bench: Bench) -> dict[str, Any]:
    """Every combination of token tree, shared vision and cached reference."""
    sides = {
        _features_name(tree, vision, cache): Side(
            kind="ours", options={"tree_packing": tree, "own_vision": not vision, "precompute_ref_log_probs": cache}
        )
        for tree in (False, True)
        for vision in (False, True)
        for cache in (False, True)
    }
    none = _features_name(False, False, False)
    seconds = bench.race(sides, bench.setting, terms=1)
    return _compared(seconds, limits.of_sides(sides, bench.setting), {name: (none, name) for name in sides})


def loading(bench: Bench) -> dict[str, Any]:
    """Seconds that one record takes before a step: read, with its pictures decoded, and put into a batch; each record once."""
    kinds = {"dpo": (ours(), bench.setting), "mdpo": (ours(loss_type=MDPO), bench.setting.but(corrupted=True))}
    found: dict[str, Any] = {}
    for kind, (side, setting) in kinds.items():
        trainer = make(side, setting)
        found[kind] = {"read": [], "collate": []}
        # The first one warms up.
        for turn in range(-1, setting.records):
            start = bench.clock()
            record = trainer.train_dataset[max(turn, 0)]  # type: ignore[index]
            read = bench.clock()
            trainer.data_collator([record])
            done = bench.clock()
            if turn >= 0:
                found[kind]["read"].append(read - start)
                found[kind]["collate"].append(done - read)
        bench.progress(f"loading {kind}: {statistics.median(found[kind]['collate']) * 1e3:.1f} ms to collate a record")
    return {"seconds_per_record": found}


def _features_name(tree: bool, vision: bool, cache: bool) -> str:
    names = [name for name, used in (("tree", tree), ("shared vision", vision), ("cached reference", cache)) if used]
    return " + ".join(names) or "none"


def memory_of(side: Side, setting: Setting) -> int:
    """Peak bytes of one training step in this process, in which nothing has run before, above the model."""
    with Loop(make(side, setting)) as loop:
        return peak_memory(loop.step)


def _memory(side: Side, setting: Setting, bench: Bench) -> int:
    peak = memory_of(side, setting) if bench.small else _memory_in_fresh_process(side, setting)
    bench.progress(f"peak of {side}: {peak / 1e6:.0f} MB")
    return peak


def _memory_in_fresh_process(side: Side, setting: Setting) -> int:
    wanted = json.dumps({"side": dataclasses.asdict(side), "setting": dataclasses.asdict(setting)})
    command = [sys.executable, "-m", "benchmarks.runs.training_step", "--memory-of", wanted]
    # glibc keeps freed blocks of up to 32 MB in its heap, where they add up to more than the step itself needs. With blocks of their own
    # they go back at once, as in an allocator made for tensors.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    return int(done.stdout.strip().splitlines()[-1])


def _share(peaks: Mapping[str, int], theirs: str, own: str) -> float:
    return peaks[own] / max(1, peaks[theirs])
