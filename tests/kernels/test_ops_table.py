"""That an op is added by its modules and one row of the table: a made-up one, seen by all that reads the table."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.kernels import ops, registry
from mmdpo_kernels.backends import ops_table
from mmdpo_kernels.backends.choice import Rule
from mmdpo_kernels.backends.ops_table import OPS, Op
from mmdpo_kernels.backends.registry import backends, load, resolve
from mmdpo_kernels.backends.triton import ahead_of_time
from mmdpo_kernels.backends.triton.runtime import Specialization

ROOT = Path(__file__).resolve().parents[2]
OP = "double"
CPU = torch.device("cpu")
FORM = Specialization(label="double float32", kernel=None, signature={}, constants={}, num_warps=1, num_stages=1)


def module(name: str, **contents: object) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(contents)
    return made


def serves(*device_types: str) -> Callable[..., str | None]:
    return lambda device_type, dtype, **features: None if device_type in device_types else f"it has no {device_type}"


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Op:
    """An op with a reference, a Triton backend that is for GPUs, and a benchmark; nothing but the row knows of it."""
    forms = {"specializations": lambda target: [FORM], "REPRESENTATIVE": ("float32",)}
    case = type("Case", (), {"op": OP, "name": "twice", "sizes": {"small": {}}})
    made = (
        module(f"mmdpo_kernels.backends.reference.{OP}", unavailable_reason=serves("cpu", "cuda"), forward=lambda x: 2 * x),
        module(f"mmdpo_kernels.backends.triton.{OP}", unavailable_reason=serves("cuda"), forward=lambda x: x + x, **forms),
        module(f"{ops.__name__}.{OP}", CASES=(case,), prepare=lambda problem, backend: None, COMPILED=(("twice",),)),
    )
    for each in made:
        monkeypatch.setitem(sys.modules, each.__name__, each)
    row = Op(
        backends=("triton", "reference"),
        rules={"cpu": (Rule(calls="calls", order=("reference",), measured=None),)},
        ahead_of_time=(OP,),
        benchmarks=(OP,),
        gpu_tests=("test_double",),
    )
    monkeypatch.setitem(OPS, OP, row)
    return row


@pytest.mark.usefixtures("double")
def test_backends_are_found_and_chosen() -> None:
    if not torch.cuda.is_available():
        assert backends()[OP] == {"triton": "it has no cpu", "reference": None}
    assert resolve(OP, "auto", CPU, torch.float32) is load(OP, "reference")
    with pytest.raises(ValueError, match="double: backend 'triton' cannot serve this call: it has no cpu"):
        resolve(OP, "triton", CPU, torch.float32)
    with pytest.raises(ValueError, match="backend must be 'auto' or one of 'triton', 'reference', got 'native'"):
        resolve(OP, "native", CPU, torch.float32)


@pytest.mark.usefixtures("double")
def test_its_kernels_are_compiled_ahead_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ahead_of_time.modules()[-1] == OP
    for other in set(OPS) - {OP}:  # interpreted kernels cannot be described
        monkeypatch.delitem(OPS, other)
    assert FORM in ahead_of_time.specializations(90) and FORM in ahead_of_time.specializations(90, everything=False)


@pytest.mark.usefixtures("double")
def test_it_is_benchmarked_and_tested_on_a_gpu() -> None:
    assert [case.name for case in registry.cases([OP])] == ["twice"]
    assert [contestant.name for contestant in registry.contestants(OP)] == ["auto", "triton", "reference"]
    assert gpu.compiled_cases()[OP] == (("twice",),)
    assert "test_double" in gpu.test_names()


@pytest.mark.parametrize("op", OPS)
def test_what_a_row_names_is_there(op: str) -> None:
    row = OPS[op]
    assert row.backends[-1] == "reference"
    assert all(hasattr(load(op, name), "unavailable_reason") for name in row.backends)
    triton = "mmdpo_kernels.backends.triton"
    assert all(hasattr(importlib.import_module(f"{triton}.{name}"), "specializations") for name in row.ahead_of_time)
    assert set(row.benchmarks) <= set(registry.all_cases())
    for name in row.gpu_tests:
        assert list((ROOT / "tests").rglob(f"{name}.py")), name


def test_every_module_of_a_backend_s_op_is_in_its_row() -> None:
    """A backend that nobody lists would never be taken."""
    folder = Path(ops_table.__file__).parent
    for op, row in OPS.items():
        assert {path.parent.name for path in folder.glob(f"*/{op}.py")} == set(row.backends)
