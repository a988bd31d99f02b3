"""What the processes of a training tell each other; with one process everything here is trivial."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")
NumberT = TypeVar("NumberT", int, float)


def is_distributed() -> bool:
    """Whether this process trains together with others."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def all_gather(value: T) -> list[T]:
    """Every process's value, in the order of their ranks."""
    if not is_distributed():
        return [value]
    values: list[T | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def all_reduce(values: Iterable[NumberT], device: torch.device) -> list[NumberT]:
    """The sum over all processes of each number; of floats in double precision."""
    given = list(values)
    exact = all(isinstance(value, int) for value in given)
    numbers = torch.tensor(given, device=device, dtype=torch.int64 if exact else torch.float64)
    if is_distributed():
        distributed.all_reduce(numbers)
    return numbers.tolist()  # type: ignore[no-any-return]


def barrier() -> None:
    """Wait for all processes."""
    if is_distributed():
        distributed.barrier()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether it holds in any process."""
    return all_reduce([int(flag)], device)[0] > 0 if is_distributed() else flag
