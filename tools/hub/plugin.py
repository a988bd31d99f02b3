"""Runs the ops' tests on a laid out repository: `pytest -p tools.hub.plugin --hub build/hub tests/kernels/...`.

`kernels` loads it; then each import of `mmdpo_kernels` and of a module in it gives what it has, and nothing else is there.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from tools.hub.sources import PACKAGE


class Alias(MetaPathFinder, Loader):
    """Finds the modules of a loaded package under another name; they stay what they are, and are there once."""

    def __init__(self, name: str, package: str) -> None:
        self._name, self._package = name, package
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != self._name:
            return None
        module = importlib.import_module(self._package + fullname[len(self._name) :])
        self._specs[fullname] = module.__spec__
        return ModuleSpec(fullname, self, is_package=hasattr(module, "__path__"))

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[self._package + spec.name[len(self._name) :]]

    def exec_module(self, module: ModuleType) -> None:
        """Its own spec again, in place of the one that the import system has just given it."""
        name = self._name + module.__name__[len(self._package) :]
        module.__spec__ = self._specs[name]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--hub", type=Path, required=True, help="a repository that `python -m tools.hub` has laid out")


def pytest_configure(config: pytest.Config) -> None:
    from kernels import get_local_kernel

    assert PACKAGE.name not in sys.modules, f"{PACKAGE.name} was imported before its tests"
    module = get_local_kernel(config.getoption("--hub").resolve())
    sys.meta_path.insert(0, Alias(PACKAGE.name, module.__name__))


def pytest_report_header(config: pytest.Config) -> str:
    return f"{PACKAGE.name}: {importlib.import_module(PACKAGE.name).__file__}"
