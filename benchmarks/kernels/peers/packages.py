"""Why a peer's package cannot be used."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch


def needs(module: str, devices: tuple[str, ...] = ("cuda",), *, half: bool = False) -> Callable[[str, torch.dtype], str | None]:
    """`unavailable_reason` of a peer that imports `module` and runs on these device types.

    Args:
        half: it takes float16 and bfloat16 only.
    """

    def unavailable_reason(device_type: str, dtype: torch.dtype) -> str | None:
        if device_type not in devices:
            return f"it runs on {' and '.join(devices)} only"
        if half and dtype not in (torch.float16, torch.bfloat16):
            return f"it takes float16 and bfloat16, not {dtype}"
        try:
            found = importlib.util.find_spec(module)
        except ImportError as error:  # of a parent package
            return f"{module} cannot be imported: {error}"
        return None if found else f"{module} is not installed"

    return unavailable_reason


def anywhere(device_type: str, dtype: torch.dtype) -> str | None:
    """`unavailable_reason` of plain PyTorch."""
    return None
