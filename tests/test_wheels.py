"""What `make wheels` promises: old systems, no torch in the links, a name for each kind, the sdist."""

from __future__ import annotations

import json
import re
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import setup_functions

from benchmarks.delivery import environments, page, wheels, without_torch
from benchmarks.measure import RESULTS, ROOT
from mmdpo_kernels.backends.native import extension

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_linking_for_an_old_glibc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """zig links for it, with the compiler's own libstdc++ inside and hidden; a build for this machine is the compiler's alone."""
    setup = setup_functions.load()
    monkeypatch.delenv("MMDPO_GLIBC", raising=False)
    assert setup.link_command(["g++"], tmp_path) == ["g++", "-shared", "-pthread"]
    monkeypatch.setenv("MMDPO_GLIBC", "2.28")
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(setup.shutil, "which", lambda name: "/zig/python-zig")
    monkeypatch.setattr(setup, "_library", lambda compiler, name: f"/gcc/{name}")
    command = setup.link_command(["g++"], tmp_path)
    assert command[:3] == ["/zig/python-zig", "cc", "-target"] and command[3].endswith("-linux-gnu.2.28")
    assert command[-3:] == ["/gcc/libgcc.a", "/gcc/libstdc++.a", "/gcc/libgcc_s.so.1"]
    assert (tmp_path / "exported.map").read_text() == "{ global: PyInit__native; local: *; };\n"
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    with pytest.raises(setup.CompileError, match="pip install ziglang"):
        setup.link_command(["g++"], tmp_path)


def test_what_the_linker_found_nowhere_is_named() -> None:
    listed = """
     1: 0000000000000000     0 NOTYPE  GLOBAL DEFAULT  UND PyErr_SetString
     2: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND memcpy@GLIBC_2.14 (3)
     3: 0000000000000000     0 NOTYPE  WEAK   DEFAULT  UND __cxa_pure_virtual
     4: 0000000000000000     0 NOTYPE  GLOBAL DEFAULT  UND _dl_find_object
     5: 00000000000451a0   485 FUNC    GLOBAL DEFAULT   12 PyInit__native
    """
    assert wheels.unknown_symbols(listed) == ["_dl_find_object"]


def test_pythons_that_do_not_run_are_left_out(tmp_path: Path) -> None:
    shim = tmp_path / "python3.99"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    assert environments.interpreters([str(shim), str(tmp_path / "nowhere"), sys.executable]) == {
        f"{sys.version_info.major}.{sys.version_info.minor}": sys.executable
    }


def test_the_sdist_lists_folders_that_there_are() -> None:
    """And holds everything that the extension is made of."""
    lines = (ROOT / "MANIFEST.in").read_text().splitlines()
    grafted = [line.split()[1] for line in lines if line.startswith("graft ")]
    assert {"benchmarks", "csrc", "tests"} <= set(grafted) and all((ROOT / name).is_dir() for name in grafted)
    assert {Path(source).parts[0] for source in setup_functions.load().native_sources()} == {"csrc"}


def test_cibuildwheel_builds_what_is_promised() -> None:
    settings = PYPROJECT["tool"]["cibuildwheel"]
    supported = PYPROJECT["project"]["requires-python"].removeprefix(">=3.")
    numbers = [re.fullmatch(r"cp3(\d+)-\*", name) for name in settings["build"]]
    assert min(int(number.group(1)) for number in numbers if number) == int(supported) and all(numbers)
    assert {f"python3.{number.group(1)}" for number in numbers if number} == set(environments.PYTHONS)
    assert settings["linux"]["manylinux-x86_64-image"] == f"manylinux_{wheels.GLIBC.replace('.', '_')}"
    assert settings["linux"]["environment"] == {"MMDPO_CUDA": "0"}


def test_the_committed_wheels_keep_their_promises() -> None:
    result = json.loads((RESULTS / "wheels.json").read_text())
    rows = result["wheels"]
    assert {row["kind"] for row in rows} == {"cpu", "cuda"}
    for row in rows:
        assert [int(number) for number in re.findall(r"\d+", row["platform"])[:2]] <= [2, 28]
        assert f"-cp{row['python'].replace('.', '')}-" in row["file"] and "manylinux_2_28" in row["file"]
        assert all(wheels.ALLOWED.match(name) for name in row["needs"])
        assert ("+cu" in row["file"]) == (row["kind"] == "cuda") == bool(row["cuda_targets"])
        if row["cuda_targets"]:
            assert row["cuda_targets"] + row["left_out"] == setup_functions.load().CUDA_TARGETS
    text = (ROOT / "docs" / "installing.md").read_text(encoding="utf-8")
    assert f"<!-- wheels: begin -->\n{page.wheels_table(result)}\n<!-- wheels: end -->" in text


@pytest.mark.nightly
@pytest.mark.longest
def test_a_wheel_from_the_sdist(tmp_path: Path) -> None:
    """Built as `make wheels` builds it: what is in both, and that it is for old systems."""
    assert wheels.main(["--kind", "cpu", "--python", sys.executable, "--output", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "wheels.json").read_text())["wheels"]
    assert row["platform"].startswith("manylinux_2_") and row["cuda_targets"] == []
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "csrc/bindings.cpp", "tests/conftest.py", "benchmarks/measure.py", "constraints.txt"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_the_compiled_half_computes_without_torch() -> None:
    """What every wheel is held to when it is built, here with the extension of this environment."""
    native = extension.load()
    assert not isinstance(native, str), native
    assert without_torch.largest_error(native) < 1e-6
