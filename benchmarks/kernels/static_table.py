"""What each Triton kernel's machine code asks of a GPU, and what that lets one expect: a prediction from the code, no measurement.

    python -m benchmarks.kernels.static_table                    # compiles for sm_80, sm_90, sm_100; writes results/static_table.json and docs
    python -m benchmarks.kernels.static_table --target 90        # one of them, to see it: printed, written to build/benchmarks
    python -m benchmarks.kernels.static_table --tables           # the section of docs/kernels.md again from the committed JSON

Needs no GPU, and TRITON_INTERPRET unset: Triton compiles, its disassembler shows the code. Counted are the instructions of one round of the
inner loop (a tile of queries by keys without a mask, or a block of a row of logits), and the clocks that each unit needs for them at its
published rate. The unit with most clocks is the limit; between it and reality lie waits, which `machine_code.simulate` estimates for sm_80
and sm_90, and memory, clocks below boost and the first and last tiles, which nothing here estimates.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from benchmarks.kernels.machine_code import DIM, GPUS, Gpu, Loop, cycles, disassemble, loops, simulate
from benchmarks.kernels.static_page import PAGE, text_of, write
from benchmarks.measure import add_place, place_of
from mmdpo_kernels.backends.triton import ahead_of_time, attention_mass, logit_rows, tree_attention
from mmdpo_kernels.backends.triton.runtime import Specialization

PRODUCTS = {"forward": 2, "grad_key": 4, "grad_query": 3, "row_partials": 1}
"""Matrix products of a tile."""
FETCHED = {"forward": ("BLOCK_N", 2, 2), "grad_key": ("BLOCK_M", 2, 4), "grad_query": ("BLOCK_N", 2, 3)}
"""Rows of the tiles that a round fetches, how many tiles, and how many with `overlap`. Of descriptors the code does not say."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One compiled form of the table."""

    kernel: str
    call: str
    variant: str
    form: Specialization

    @property
    def tile_flops(self) -> int:
        """Of a tile's products; 0: a row of logits."""
        constants = self.form.constants
        return 2 * PRODUCTS.get(self.kernel, 0) * constants.get("BLOCK_M", 0) * constants.get("BLOCK_N", 0) * DIM


def subjects(target: int) -> Iterator[Subject]:
    """Attention at head dim 128 in bfloat16 and its variants, masses of few rows, and the head's rows."""
    for form in tree_attention.specializations(target):
        for call in ("causal", "tree", "tree mass"):
            _, kernel, rest = form.label.split(" ", 2)
            if kernel in PRODUCTS and rest == f"bf16 {DIM} {call}":
                yield Subject(kernel=kernel, call=call, variant="shipped", form=form)
    if target >= 90:
        for form in tree_attention.candidates(target):
            (_, kernel, *_), call = form.label.split(), form.label.split(",")[0].split(f"{DIM} ")[1]
            extras = [word for word in ("descriptors", "specialize", "overlap") if word in form.label]
            yield Subject(kernel=kernel, call=call, variant=", ".join(extras), form=form)
    for form in attention_mass.specializations(target):
        if form.label.startswith("attention_mass row_partials") and form.label.endswith(f"forward mean bf16 {DIM}"):
            yield Subject(kernel="row_partials", call="mean of rows", variant="shipped", form=form)
    for form in logit_rows.specializations(target):
        for call in ("fold", "gradient"):
            if form.label == f"logit_rows {call} bf16":
                yield Subject(kernel="fold_rows", call=call, variant="shipped", form=form)
    if target >= 90:
        for form in logit_rows.candidates():
            variant = "candidate, keep" if form.constants["KEEP"] else "candidate"
            yield Subject(kernel="fold_rows", call="gradient", variant=variant, form=form)


def row_of(subject: Subject, target: int) -> dict[str, Any]:
    """Counts, clocks by unit, the limit and the prediction; "problem" in place of all where it does not compile as it should."""
    form, gpu = subject.form, GPUS[target]
    constants = form.constants
    row: dict[str, Any] = {
        "target": target,
        "kernel": subject.kernel,
        "call": subject.call,
        "variant": subject.variant,
        "tile": [constants[name] for name in ("BLOCK_M", "BLOCK_N") if name in constants] or [constants["BLOCK"]],
        "warps": form.num_warps,
        "stages": form.num_stages,
    }
    try:
        compiled = ahead_of_time.compile_form(form, target)
    except Exception as error:  # noqa: BLE001 - what the compiler does not take is an answer
        return {**row, "problem": f"the compiler does not take it: {type(error).__name__}"}
    cubin = compiled.asm["cubin"]
    usage = ahead_of_time.resource_usage(cubin)
    row |= {"registers": usage["REG"], "spilled": usage["STACK"] + usage["LOCAL"], "shared": compiled.metadata.shared}
    code = disassemble(cubin, Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm")
    found = main_loops(loops(code), specialized=constants.get("SPECIALIZE", False))
    if row["spilled"]:
        return {**row, "problem": f"spills {row['spilled']} bytes"}
    if not found:
        return {**row, "problem": "no loop found in the code"}
    groups = len(found) if constants.get("SPECIALIZE") else form.num_warps // 4
    threads = 128 * (groups + 1 if constants.get("SPECIALIZE") else groups)
    shared_limit = ahead_of_time.SHARED_LIMIT[target]
    resident = max(
        1, min(gpu.registers // (threads * -(-usage["REG"] // 8) * 8), shared_limit // max(1, row["shared"]), 2048 // threads)
    )
    return {**row, "resident": resident, **_clocks(found, groups, resident, subject, gpu)}


def main_loops(found: Sequence[Loop], *, specialized: bool) -> list[Loop]:
    """Of the loops those with the work: of several copies the shortest, which has no masks; of parted warps every group's.

    A copy with masks may have more products, behind the branch of key blocks of several segments.
    """

    def products(loop: Loop) -> int:
        return sum(each.kind == "tensor" for each in loop.round) or sum(each.kind == "tensor" for each in loop.body)

    most = max(map(products, found), default=0)
    if most == 0:  # rows of logits: both ways
        return list(found)
    working = [loop for loop in found if 2 * products(loop) >= most]
    return working if specialized else [min(working, key=lambda loop: len(loop.round))]


def _clocks(found: Sequence[Loop], groups: int, resident: int, subject: Subject, gpu: Gpu) -> dict[str, Any]:
    """Of a tile, on one multiprocessor; of a row of logits a block, read and, with a gradient, written."""
    rates, flops = gpu.rates, subject.tile_flops
    counts = [loop.count() for loop in found]
    each_warps = 4 if len(found) == groups else 4 * groups
    units: dict[str, float] = {}
    for count in counts:
        for unit, clocks in cycles(count, rates, each_warps).items():
            units[unit] = units.get(unit, 0.0) + clocks
    instructions = {kind: sum(count[kind] for count in counts) // (len(found) if flops else 1) for kind in counts[0] | counts[-1]}
    result: dict[str, Any] = {"instructions": {kind: instructions[kind] for kind in sorted(instructions)}}
    result["products"] = dict(found[0].names("tensor"))
    if not flops:
        width = subject.form.constants["BLOCK"]
        # Read once from memory and, with a gradient, again from the caches and written.
        memory = {80: 2.039e12, 90: 3.35e12, 100: 8e12}[next(target for target, one in GPUS.items() if one is gpu)]
        units["memory"] = 2 * width * len(found) / (memory / gpu.processors / gpu.clock)
        return {**result, **_limit(units)}
    units["tensor"] = flops / rates.tensor
    reads = sum(each.shared_bytes * (groups if each.name.startswith("HGMMA") else 4 * groups) for each in found[0].round)
    constants = subject.form.constants
    if constants.get("DESCRIPTORS"):
        rows, tiles, overlapped = FETCHED[subject.kernel]
        reads += 2 * DIM * constants[rows] * (overlapped if constants["OVERLAP"] else tiles)
    units["shared"] = reads / rates.shared
    result |= _limit(units)
    result["tflops_at_limit"] = _tflops(flops, result["limit_clocks"], gpu)
    if any(each.flops for each in found[0].round):
        # A group of parted warps waits for no other group; the groups of other kernels meet at the barriers of their block.
        block = [[loop] for loop in found] if len(found) == groups and groups > 1 else [[found[0]] * groups]
        result["simulated_clocks"] = max(simulate(block * resident, rates) / resident, result["limit_clocks"])
        result["tflops_simulated"] = _tflops(flops, result["simulated_clocks"], gpu)
    return result


def _limit(units: dict[str, float]) -> dict[str, Any]:
    limit = max(units, key=lambda unit: units[unit])
    return {"clocks": {unit: round(units[unit], 1) for unit in sorted(units)}, "limit": limit, "limit_clocks": units[limit]}


def _tflops(flops: int, clocks: float, gpu: Gpu) -> float:
    return flops / clocks * gpu.processors * gpu.clock / 1e12


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=int, action="append", choices=ahead_of_time.TARGETS, help="may be repeated; default all")
    parser.add_argument("--tables", action="store_true", help="the section again from the committed JSON")
    add_place(parser)
    arguments = parser.parse_args(argv)
    if arguments.tables:
        write()
        return
    ahead_of_time.require_compiler()
    rows = []
    for target in arguments.target or ahead_of_time.TARGETS:
        for subject in subjects(target):
            rows.append(row_of(subject, target))
            print(
                {name: rows[-1].get(name) for name in ("target", "kernel", "call", "variant", "tile", "limit", "problem")},
                flush=True,
            )
    place = place_of(arguments, part=arguments.target is not None)
    content = {"triton": triton.__version__, "rows": rows}
    print(f"written: {place.result('static_table', content)}")
    place.section(PAGE, "static_table", text_of(content))


if __name__ == "__main__":
    main()
