"""What an installation promises: dependencies, exact constraints, typing markers, the console command."""

from __future__ import annotations

import os
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import mmdpo_kernels
import mmdpo_trainers
from mmdpo_trainers.config.shipped import CONFIGS

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
TOOLS = PYPROJECT["dependency-groups"]


def project(requirement: str) -> str:
    """Normalised project name of a requirement line."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None, requirement
    return re.sub(r"[-_.]+", "-", found.group()).lower()


def constraints(file: str = "constraints.txt") -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    return {project(line): line for line in lines}


def test_installing_without_extras_needs_three_packages() -> None:
    needed = [line for line in metadata.requires("mmdpo-kernels") or [] if "extra ==" not in line]
    assert {project(line) for line in needed} == {"torch", "triton", "numpy"}
    assert set(metadata.metadata("mmdpo-kernels").get_all("Provides-Extra") or []) == set(EXTRAS)


# vLLM brings a torch and a transformers of its own into an environment of its own.
@pytest.mark.parametrize("group", ["core", "build", *TOOLS, *(name for name in EXTRAS if name != "vllm")])
def test_every_dependency_is_pinned(group: str) -> None:
    groups = {"core": PYPROJECT["project"]["dependencies"], "build": PYPROJECT["build-system"]["requires"], **TOOLS, **EXTRAS}
    assert not {project(line) for line in groups[group]} - set(constraints())


def test_constraints_are_exact_and_name_no_place() -> None:
    for line in (line for file in ("", "-oldest", "-hub", "-vllm") for line in constraints(f"constraints{file}.txt").values()):
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.]+", line), line


def test_the_oldest_transformers_is_the_one_that_is_promised() -> None:
    (promised,) = (line for line in EXTRAS["train"] if project(line) == "transformers")
    assert constraints("constraints-oldest.txt")["transformers"].removesuffix(".0") == promised.replace(">=", "==")


@pytest.mark.smoke
def test_the_transformers_in_front_of_the_path_is_the_one_that_runs() -> None:
    import transformers

    first = os.environ.get("PYTHONPATH", "").split(os.pathsep)[0]
    if (Path(first) / "transformers").is_dir():
        assert Path(transformers.__file__).is_relative_to(first)
    else:
        assert constraints()["transformers"] == f"transformers=={transformers.__version__}"


@pytest.mark.parametrize("package", [mmdpo_kernels, mmdpo_trainers])
def test_every_folder_of_modules_is_a_package(package: object) -> None:
    """A folder without `__init__.py` is not in the wheel, though it can be imported from a checkout."""
    files = Path(package.__file__).parent.rglob("*.py")  # type: ignore[attr-defined]
    assert not [folder for folder in {file.parent for file in files} if not (folder / "__init__.py").is_file()]


def test_every_configuration_is_in_the_wheel() -> None:
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["mmdpo_trainers"]
    carried = {path for pattern in patterns for path in CONFIGS.parent.glob(pattern)}
    files = {path for path in CONFIGS.rglob("*") if path.is_file()}
    assert files and not files - carried


@pytest.mark.parametrize("package", [mmdpo_kernels, mmdpo_trainers])
def test_typing_markers(package: object) -> None:
    assert (Path(package.__file__).parent / "py.typed").is_file()  # type: ignore[attr-defined]


def test_the_console_command_exists() -> None:
    (command,) = metadata.entry_points(group="console_scripts", name="mmdpo")
    assert callable(command.load())


def test_versions_agree() -> None:
    assert mmdpo_kernels.__version__ == PYPROJECT["project"]["version"] == metadata.version("mmdpo-kernels")
