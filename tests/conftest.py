"""Every test starts from the same seed and one thread, whatever ran before it."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from by_day import leave_to_the_night

if not torch.cuda.is_available():
    # Read when triton is imported, which the first use of its kernels does.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, so that the other workers do not wait for it in the end."""
    leave_to_the_night(items, "tests/")
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)


def pytest_collection_finish() -> None:
    """What all tests have imported is not looked through again and again: every training begins with a collection of garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_start() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
