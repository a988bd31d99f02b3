"""Which instruction sets the C++ kernels are built for and run with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import setup_functions

from mmdpo_kernels.backends.native import extension

MODULE = extension.load()
LEVELS = [] if isinstance(MODULE, str) else MODULE.supported_cpu_levels()
# As Linux names what a level needs.
NEEDS = {
    "generic": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl"},
    "amx": {"amx_tile", "amx_bf16", "avx512_bf16"},
}


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the CPU is not described in /proc/cpuinfo")
@pytest.mark.parametrize("level", NEEDS)
def test_no_level_that_the_cpu_lacks(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert level not in LEVELS or NEEDS[level] <= flags
    monkeypatch.setenv("MMDPO_CPU_LEVEL", level)
    if level in LEVELS:
        assert MODULE.cpu_level() == level
    else:
        with pytest.raises(ValueError, match=f"expected one of the levels this CPU runs .*, got '{level}'"):
            MODULE.cpu_level()


def test_what_is_emulated_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMDPO_CPU_LEVEL", raising=False)
    assert MODULE.cpu_level() == LEVELS[-1] != "amx_emulated"
    monkeypatch.setenv("MMDPO_CPU_LEVEL", "amx_emulated")
    assert MODULE.cpu_level() == "amx_emulated"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_compiler_too_old_for_amx_builds_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup = setup_functions.load()
    sources = [Path(name) for name in ("tree_attention.cpp", "tree_attention_avx512.cpp", "tree_attention_amx.cpp")]
    old = tmp_path / "g++"
    old.write_text('#!/bin/sh\ncase "$*" in *amx*) exit 1;; esac\nexec g++ "$@"\n')
    old.chmod(0o755)
    assert setup.compilable([str(old)], sources) == (sources[:2], [])
    assert "without the CPU level amx" in capsys.readouterr().out
    assert setup.compilable([str(old)], sources[:2]) == (sources[:2], [])
