"""The Triton kernels compiled for GPUs that are not here: nothing spills, shared memory fits. In processes of their own, not interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmdpo_kernels.backends.triton import ahead_of_time, runtime

SPILLING = """
import triton
import triton.language as tl
from mmdpo_kernels.backends.triton.ahead_of_time import compile_one
from mmdpo_kernels.backends.triton.runtime import Specialization

@triton.jit
def kernel(X, OUT, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(X + at)  # 256 values a thread, all needed after the sum
    tl.store(OUT + at, x / tl.sum(x))

form = Specialization(
    label="spilling", kernel=kernel, signature={"X": "*fp32:16", "OUT": "*fp32:16"}, constants={"SIZE": 8192}, num_warps=1, num_stages=1
)
row = compile_one(form, 90)
print(row)
assert row.spilled > 0 and "spills" in row.problem
"""

CANDIDATES = """
from mmdpo_kernels.backends.triton import logit_rows, tree_attention
from mmdpo_kernels.backends.triton.ahead_of_time import compile_one

rows = [compile_one(form, 90) for form in (*tree_attention.candidates(90), *logit_rows.candidates())]
assert {row.label.split()[1] for row in rows} == {"forward", "grad_key", "grad_query", "gradient"}
assert not [row for row in rows if row.problem], rows
"""


def run(arguments: list[str], cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    clean |= {"TRITON_CACHE_DIR": str(cache), **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=clean)


@pytest.mark.parametrize(
    "target", [pytest.param(each, marks=[] if each == 90 else pytest.mark.nightly) for each in ahead_of_time.TARGETS]
)
def test_no_form_spills_and_shared_memory_fits(tmp_path: Path, target: int) -> None:
    """The few forms that each module calls REPRESENTATIVE, for the time it takes: bfloat16, head dim 128, every feature at once.

    `python -m mmdpo_kernels.backends.triton.ahead_of_time --all` compiles the rest.
    """
    file = tmp_path / "rows.json"
    done = run(["-m", "mmdpo_kernels.backends.triton.ahead_of_time", "--json", str(file), "--target", str(target)], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["forms"]
    assert {row["target"] for row in rows} == {target}
    for name in ahead_of_time.modules():
        assert any(row["label"].startswith(name) for row in rows), name
    assert all(row["registers"] > 0 and row["spilled"] == 0 and row["problem"] is None for row in rows)


def test_a_kernel_that_spills_is_caught(tmp_path: Path) -> None:
    program = tmp_path / "spilling.py"
    program.write_text(SPILLING)
    done = run([str(program)], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.nightly
def test_candidates_compile_for_sm_90_without_spills(tmp_path: Path) -> None:
    program = tmp_path / "candidates.py"
    program.write_text(CANDIDATES)
    done = run([str(program)], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("target", "shared", "fits"), [(80, 170_000, False), (90, 170_000, True), (100, 240_000, False)])
def test_shared_memory_is_held_against_the_target_s(target: int, shared: int, fits: bool) -> None:
    row = ahead_of_time.Row(label="", target=target, num_warps=4, num_stages=1, registers=9, spilled=0, shared=shared)
    assert (row.problem is None) == fits


def test_an_interpreting_process_is_told_why_it_cannot(tmp_path: Path) -> None:
    done = run(["-m", "mmdpo_kernels.backends.triton.ahead_of_time"], tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET unset" in done.stderr
    if runtime.INTERPRETED:
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
            next(iter(ahead_of_time.compile_all()))
