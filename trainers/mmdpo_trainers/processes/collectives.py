"""What the processes of a training tell each other; with one process everything here is trivial."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")


def several() -> bool:
    """Whether this process trains together with others."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def gathered(value: T) -> list[T]:
    """Every process's value, in the order of their ranks."""
    if not several():
        return [value]
    values: list[T | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def summed(values: Iterable[int], device: torch.device) -> list[int]:
    """The sum over all processes of each number."""
    numbers = torch.tensor(list(values), device=device)
    if several():
        distributed.all_reduce(numbers)
    return numbers.tolist()  # type: ignore[no-any-return]


def barrier() -> None:
    """Wait for all processes."""
    if several():
        distributed.barrier()


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether it holds in any process."""
    return summed([int(flag)], device)[0] > 0 if several() else flag
