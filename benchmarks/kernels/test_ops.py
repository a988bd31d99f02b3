"""pytest-benchmark over the same registry: `pytest benchmarks/kernels/test_ops.py --benchmark-json=ops.json`.

`MMDPO_BENCHMARK_SIZE=small` takes tiny inputs; `-k` chooses ops, cases and contestants. A contestant that cannot run is skipped with its
reason, one whose result is wrong fails.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.kernels import registry
from benchmarks.kernels.case import CannotServe, Case, Contestant, NotOfThisCase
from benchmarks.kernels.harness import Setting, admit, synchronise

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is in the [dev] extra")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTING = Setting(
    device=DEVICE,
    dtype=torch.bfloat16 if DEVICE.type == "cuda" else torch.float32,
    size=os.environ.get("MMDPO_BENCHMARK_SIZE", DEVICE.type),
    repeats=0,
)


def _races() -> list[Any]:
    return [
        pytest.param(case, contestant, id="-".join((case.op, case.name, re.sub(r"\W+", "_", contestant.name))))
        for case in registry.cases(size=SETTING.size)
        for contestant in registry.contestants(case.op)
    ]


@pytest.mark.parametrize(("case", "contestant"), _races())
def test_op(benchmark: Any, case: Case, contestant: Contestant) -> None:
    setting = replace(SETTING, dtype=case.dtype or SETTING.dtype)
    problem = case.make(case.sizes[setting.size], setting.device, setting.dtype)
    try:
        run, facts = admit(contestant, problem, case.truth(problem), setting)
    except CannotServe as answer:
        pytest.skip(str(answer))
    except NotOfThisCase:
        pytest.skip("it would repeat another contestant here")
    except ValueError as error:
        if "cannot serve this call" not in str(error):
            raise
        pytest.skip(str(error))
    benchmark.group = f"{case.op} {case.name}"
    benchmark.extra_info.update(facts)

    def call() -> None:
        run.call()
        synchronise(SETTING.device)

    benchmark(call)
