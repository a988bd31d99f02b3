"""What several test files read: a tiny base and an adapter of it, which no test changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from exported_run import make_adapter, make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from _unchanged(make_base(tmp_path_factory.mktemp("base") / "tiny-llava"))


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from _unchanged(make_adapter(base, tmp_path_factory.mktemp("adapter") / "final"))


def _unchanged(folder: Path) -> Iterator[Path]:
    """What is written beside a shared model would reach whatever test runs next, in another order each time."""
    made = _files(folder)
    yield folder
    assert _files(folder) == made, f"a test wrote into {folder}, which all share; copy it first"


def _files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}
