"""Loops of a compiled kernel as the disassembler prints them: what one round executes, and how its units overlap.

A round is the cheapest way through the loop from its head back to it: waits that succeed at once, branches that need not be taken left out.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path

_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x_\w+):")
_TARGET = re.compile(r"`\((\.L_x_\w+)\)")
_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)")
_HALF_MMA = {"HMMA.16816": 2 * 16 * 8 * 16, "HMMA.1688": 2 * 16 * 8 * 8}


@dataclass(frozen=True)
class Instruction:
    """One of a warp."""

    name: str
    """With its modifiers: `HGMMA.64x128x16.F32.BF16`."""
    operands: str
    guard: str
    """Predicate, or nothing."""

    @property
    def flops(self) -> int:
        """Of a tensor-core instruction: of a group of four warps on sm_90, of a warp on sm_80. 0 of others, and where the name does not say."""
        if self.name.startswith("HGMMA"):
            m, n, k = map(int, _SHAPE.search(self.name).groups())  # type: ignore[union-attr]
            return 2 * m * n * k
        return next((flops for name, flops in _HALF_MMA.items() if self.name.startswith(name)), 0)

    @property
    def shared_bytes(self) -> int:
        """Read from or written to shared memory: of a product of sm_90 the operands that are no registers, else of a warp."""
        if self.name.startswith("HGMMA"):
            m, n, k = map(int, _SHAPE.search(self.name).groups())  # type: ignore[union-attr]
            both = self.operands.split(",")[1].strip().startswith("gdesc")
            return 2 * k * (n + m * both)
        if self.name.startswith("LDSM") or self.name.startswith("STSM"):
            return 128 * int(self.name[-1]) if self.name[-1] in "24" else 128
        if self.name.startswith(("LDS", "STS", "LDGSTS")):
            return 32 * next((int(bits) // 8 for bits in self.name.split(".") if bits in ("128", "64", "16", "8")), 4)
        return 0

    @property
    def kind(self) -> str:
        """Unit that executes it: one of `UNITS`, or "other", which takes a place in the issue order alone."""
        return next((kind for kind, names in _KINDS if self.name.startswith(names)), "other")


_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("tensor", ("HGMMA", "HMMA", "UTCHMMA", "UTCMMA", "UTCQMMA")),
    ("exponential", ("MUFU",)),
    ("wait", ("WARPGROUP.DEPBAR", "DEPBAR", "SYNCS.PHASECHK", "BAR.SYNC", "WARPGROUP.ARRIVE", "WARPSYNC", "UCGABAR")),
    ("load", ("LDG", "LDGSTS", "UTMALDG", "UBLKCP")),
    ("shared", ("LDS", "LDSM", "STS", "STSM", "LDT", "STT", "UTCCP")),
    ("convert", ("F2F", "I2F", "F2I")),
    ("float", ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP", "HADD2", "HMUL2", "HFMA2", "F2FP", "FADD2", "FMUL2", "FFMA2")),
    ("integer", ("IADD", "IMAD", "LOP3", "ISETP", "SEL", "SHF", "LEA", "IMNMX", "VIMNMX", "PRMT", "MOV", "PLOP3", "VIADD")),
    ("shuffle", ("SHFL", "R2UR", "REDUX")),
)


@dataclass(frozen=True)
class Loop:
    """One loop, innermost of those with its instructions."""

    body: tuple[Instruction, ...]
    """Every instruction in it, whether a round executes it or not."""
    round: tuple[Instruction, ...]

    def count(self) -> Counter[str]:
        """Instructions a round by kind; tensor-core instructions and loads may be behind branches of one thread: of the whole body."""
        kinds = Counter(each.kind for each in self.round)
        whole = Counter(each.kind for each in self.body)
        for kind in ("load", "tensor"):
            kinds[kind] = kinds[kind] or whole[kind]
        return kinds

    def names(self, kind: str) -> Counter[str]:
        """Of one kind, by name, in a round."""
        return Counter(each.name for each in self.round if each.kind == kind)


def disassemble(cubin: bytes, program: Path) -> str:
    """program: nvdisasm."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, "--print-code", file.name], capture_output=True, text=True, check=True).stdout


def loops(code: str) -> list[Loop]:
    """Those of a kernel's machine code whose round has a tensor-core instruction or an exponential, in the order of the code."""
    blocks, following = _blocks(code)
    found = []
    for head in range(len(blocks)):
        tails = [tail for tail in range(head, len(blocks)) if head in following[tail]]
        if not tails:
            continue
        members = _members(head, tails, following)
        path = _cheapest_round(head, members, blocks, following)
        body = tuple(each for block in sorted(members) for each in blocks[block])
        loop = Loop(body, tuple(each for block in path for each in blocks[block]))
        if any(each.kind in ("tensor", "exponential") for each in body):
            found.append((members, loop))
    # Of nested loops the inner one.
    return [loop for members, loop in found if not any(other < members for other, _ in found)]


def _blocks(code: str) -> tuple[list[list[Instruction]], list[set[int]]]:
    """Basic blocks, and the blocks that can follow each."""
    blocks: list[list[Instruction]] = [[]]
    at: dict[str, int] = {}
    for line in code.splitlines():
        label, found = _LABEL.match(line), _LINE.search(line)
        if label:
            if blocks[-1]:
                blocks.append([])
            at[label[1]] = len(blocks) - 1
        elif found:
            blocks[-1].append(Instruction(found[2], found[3], found[1] or ""))
            if found[2] in ("BRA", "EXIT", "RET", "BRX") or found[2].startswith(("BRA.", "RET.")):
                blocks.append([])
    following: list[set[int]] = []
    for index, block in enumerate(blocks):
        last = block[-1] if block else None
        after = {index + 1} if index + 1 < len(blocks) else set()
        if last is not None and last.name.startswith(("BRA", "EXIT", "RET", "BRX")):
            target = _TARGET.search(last.operands)
            after = (after if last.guard else set()) | ({at[target[1]]} if target and target[1] in at else set())
        following.append(after)
    return blocks, following


def _members(head: int, tails: Sequence[int], following: Sequence[set[int]]) -> frozenset[int]:
    """Blocks from which a tail is reached without passing the head, and which the head reaches."""
    before: list[list[int]] = [[] for _ in following]
    for block, after in enumerate(following):
        for each in after:
            before[each].append(block)
    members, queue = {head}, deque(tails)
    while queue:
        block = queue.popleft()
        if block not in members:
            members.add(block)
            queue.extend(before[block])
    return frozenset(members)


def _cheapest_round(
    head: int, members: frozenset[int], blocks: Sequence[Sequence[Instruction]], following: Sequence[set[int]]
) -> list[int]:
    """Blocks of the way from the head back to it with fewest instructions."""
    best = {head: 0}
    came: dict[int, int] = {}
    heap = [(0, head)]
    while heap:
        cost, block = heappop(heap)
        if head in following[block] and (block != head or head in following[head]):
            path = [block]
            while path[-1] != head:
                path.append(came[path[-1]])
            return path[::-1]
        for after in following[block] & members:
            price = cost + len(blocks[after])
            if after not in best or price < best[after]:
                best[after], came[after] = price, block
                heappush(heap, (price, after))
    return [head]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a multiprocessor does in a clock, published."""

    tensor: int
    """FLOP in bfloat16, dense."""
    exponential: int
    """Threads' instructions, as the following."""
    float: int
    integer: int
    convert: int
    shuffle: int
    issue: int = 128
    """Of any kind: four schedulers with a warp each."""
    shared: int = 128
    """Bytes of shared memory."""


DIM, LENGTH = 128, 8192
"""Of the goals."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Published figures of the GPU that stands for a target."""

    name: str
    processors: int
    clock: float
    """Hertz, boost, at which the peak below is published."""
    registers: int = 65536
    rates: Rates


# Processors, clocks and dense bfloat16 peaks (312, 989 and 2,250 TFLOP/s): NVIDIA's A100 and H100 architecture whitepapers and the data sheet
# of DGX B200. Results a clock and multiprocessor: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions".
_COMMON = {"exponential": 16, "integer": 64, "convert": 64, "shuffle": 32}
GPUS = {
    80: Gpu(name="A100 SXM", processors=108, clock=1.41e9, rates=Rates(tensor=2048, float=64, **_COMMON)),
    90: Gpu(name="H100 SXM", processors=132, clock=1.83e9, rates=Rates(tensor=4096, float=128, **_COMMON)),
    100: Gpu(name="B200", processors=148, clock=1.856e9, rates=Rates(tensor=8192, float=128, **_COMMON)),
}


def cycles(counts: Mapping[str, int], rates: Rates, warps: int) -> dict[str, float]:
    """Clocks that each unit is taken for by a round of so many warps, tensor cores and shared memory left out."""
    threads = 32 * warps
    found = {
        kind: counts.get(kind, 0) * threads / getattr(rates, kind)
        for kind in ("exponential", "float", "integer", "convert", "shuffle")
    }
    return {**found, "issue": sum(counts.values()) * threads / rates.issue}


@dataclass(frozen=True)
class _Step:
    what: str
    """work, product, wait (until so many products are pending) or barrier."""
    amount: float = 0.0


def product_cycles(each: Instruction, rates: Rates) -> float:
    """Clocks of one tensor-core instruction of a group of four warps: its arithmetic, or its reads of shared memory if those take longer."""
    groups = 4 if each.name.startswith("HMMA") else 1
    return max(groups * each.flops / rates.tensor, each.shared_bytes / rates.shared)


def _steps(loop: Loop, rates: Rates) -> list[_Step]:
    """A round of a group of four warps, one a scheduler."""
    steps: list[_Step] = []
    pending: Counter[str] = Counter()
    asynchronous = any(each.name.startswith("HGMMA") for each in loop.round)

    def flush() -> None:
        if pending:
            # mma.sync has no wait of its own: arithmetic takes its results.
            if steps and steps[-1].what == "product" and not asynchronous and pending["float"] + pending["exponential"]:
                steps.append(_Step("wait"))
            steps.append(_Step("work", max(cycles(pending, rates, 4).values())))
            pending.clear()

    for each in loop.round:
        if each.flops:
            flush()
            steps.append(_Step("product", product_cycles(each, rates)))
        elif each.name.startswith("WARPGROUP.DEPBAR"):
            flush()
            steps.append(_Step("wait", float(int(each.operands.split(",")[1], 16))))
        elif each.name.startswith("BAR.SYNC"):
            flush()
            steps.append(_Step("barrier"))
        else:
            pending[each.kind] += 1
    flush()
    return steps


QUANTUM = 8.0
"""Clocks of one group's work before another group may have the schedulers."""


def simulate(members: Sequence[Sequence[Loop]], rates: Rates, rounds: int = 24) -> float:
    """Clocks a round of all groups of four warps on a multiprocessor, in the steady state.

    The tensor cores take one product after another, in the order of arrival; all other work shares the schedulers in turns; products run
    beside their own warps until these wait for them, on sm_80 until arithmetic follows. Memory is never waited for.

    Args:
        members: of each block of threads its groups, by the loop each runs. Barriers hold the groups of a block together.
    """
    groups = [_Group(number, _steps(loop, rates)) for number, block in enumerate(members) for loop in block]
    tensor = schedulers = 0.0
    ends: dict[int, list[float]] = {number: [] for number in range(len(groups))}
    while any(group.round < rounds for group in groups):
        ready = [group for group in groups if group.round < rounds and not group.held]
        group = min(ready, key=lambda each: each.time)
        step = group.steps[group.at]
        if step.what == "work":
            part = min(QUANTUM, step.amount - group.done)
            group.time = schedulers = max(group.time, schedulers) + part
            group.done += part
            if group.done < step.amount:
                continue
        elif step.what == "product":
            tensor = max(tensor, group.time) + step.amount
            group.products.append(tensor)
        elif step.what == "wait":
            # What is waited for by number is a whole chain of products, of which this kernel has one or two in flight.
            group.time = max([group.time, *(group.products if step.amount == 0 else group.products[:-1])])
            group.products = [] if step.amount == 0 else group.products[-1:]
        elif step.what == "barrier":
            group.held = True
            fellows = [each for each in groups if each.block == group.block and each.round < rounds]
            if all(each.held for each in fellows):
                latest = max(each.time for each in fellows)
                for each in fellows:
                    each.time, each.held = latest, False
                    _next(each, ends[groups.index(each)])
            continue
        _next(group, ends[groups.index(group)])
    # The first rounds fill the units.
    half = rounds // 2
    return max((times[-1] - times[half - 1]) / (rounds - half) for times in ends.values())


class _Group:
    def __init__(self, block: int, steps: list[_Step]) -> None:
        self.block, self.steps = block, steps
        self.at = self.round = 0
        self.time = self.done = 0.0
        self.held = False
        self.products: list[float] = []


def _next(group: _Group, ends: list[float]) -> None:
    group.at, group.done = group.at + 1, 0.0
    if group.at == len(group.steps):
        group.at, group.round = 0, group.round + 1
        ends.append(group.time)
