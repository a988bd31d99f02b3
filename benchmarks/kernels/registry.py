"""Ops and their cases: inputs, FLOPs, bytes, floor, and who contends."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.kernels import ours, peers
from benchmarks.kernels.case import Case, Contestant
from benchmarks.kernels.ops import attention_mass, linear_logprobs, logit_rows, preference_loss, tree_attention

# In the order in which they run; where time is short, the last ones are left out.
CASES: dict[str, tuple[Case, ...]] = {
    "attention_mass": attention_mass.CASES,
    "tree_attention": tree_attention.CASES,
    "linear_logprobs": linear_logprobs.CASES,
    "logit_rows": logit_rows.CASES,
    "preference_loss": preference_loss.CASES,
}


def cases(ops: Sequence[str] = (), names: Sequence[str] = (), size: str = "small") -> list[Case]:
    """The cases that have this size, of the named ops and with the named names; none named: all.

    Raises:
        ValueError: an op or a case that there is none of.
    """
    strange = [op for op in ops if op not in CASES]
    if strange:
        raise ValueError(f"no op is called {', '.join(strange)}; there are {', '.join(CASES)}")
    known = {case.name for op in ops or CASES for case in CASES[op]}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no case is called {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return [case for op in ops or CASES for case in CASES[op] if size in case.sizes and (not names or case.name in names)]


def contestants(op: str) -> list[Contestant]:
    """Ours first, then peers; whether each can run here is for it to say."""
    return [*ours.contestants(op), *peers.contestants(op)]
