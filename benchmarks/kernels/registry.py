"""Ops and their cases: inputs, FLOPs, bytes, floor, and who contends."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.kernels import ops as benchmarked
from benchmarks.kernels import ours, peers
from benchmarks.kernels.case import Case, Contestant


def all_cases() -> dict[str, tuple[Case, ...]]:
    """By op, in the order in which they run; where time is short, the last ones are left out."""
    return {name: module.CASES for name, module in benchmarked.modules().items()}


def cases(ops: Sequence[str] = (), names: Sequence[str] = (), size: str = "small") -> list[Case]:
    """The cases that have this size, of the named ops and with the named names; none named: all.

    Raises:
        ValueError: an op or a case that there is none of.
    """
    every = all_cases()
    strange = [op for op in ops if op not in every]
    if strange:
        raise ValueError(f"no op is called {', '.join(strange)}; there are {', '.join(every)}")
    known = {case.name for op in ops or every for case in every[op]}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no case is called {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return [case for op in ops or every for case in every[op] if size in case.sizes and (not names or case.name in names)]


def contestants(op: str) -> list[Contestant]:
    """Ours first, then peers; whether each can run here is for it to say."""
    return [*ours.contestants(op), *peers.contestants(op)]
