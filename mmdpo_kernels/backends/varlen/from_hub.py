"""Flash attention from Hugging Face's Hub, as the `kernels` package loads it; only where `MMDPO_HUB_KERNELS=1` asks for it.

Without that nothing is looked up and nothing is downloaded: what is in a cache must not decide which kernels a run uses. With it, `kernels`
takes a build from its cache, from the folder that `LOCAL_KERNELS` names, or, unless `HF_HUB_OFFLINE=1`, from the Hub.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import NamedTuple

import torch

VARIABLE = "MMDPO_HUB_KERNELS"


class Repository(NamedTuple):
    """A kernel repository, and the functions of its `flash_attn_interface` that are called."""

    name: str
    version: int
    """Of its interface: the branch `v1` for 1."""
    functions: tuple[str, ...]


FLASH_3 = Repository("kernels-community/flash-attn3", 1, ("_flash_attn_forward", "_flash_attn_backward"))
"""https://huggingface.co/kernels/kernels-community/flash-attn3"""
FLASH_2 = Repository("kernels-community/flash-attn2", 4, ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"))
"""https://huggingface.co/kernels/kernels-community/flash-attn2, in the version that is built for PyTorch 2.10 and newer."""


def missing(repository: Repository) -> str | None:
    """Why its functions cannot be called, or None; loads them, where they are asked for."""
    if os.environ.get(VARIABLE) != "1":
        return (
            f"is taken from the Hub only where {VARIABLE}=1 asks for it; the `kernels` package (pip install kernels) then downloads "
            f"{repository.name}, version {repository.version}, where its cache has none"
        )
    found = _load(repository)
    return found if isinstance(found, str) else None


def interface(repository: Repository) -> ModuleType:
    """The module with its functions.

    Raises:
        RuntimeError: there is a reason why not.
    """
    found = _load(repository)
    if isinstance(found, str):
        raise RuntimeError(f"{repository.name} {found}")
    return found


@functools.cache
def _load(repository: Repository) -> ModuleType | str:
    """The module, or why there is none; found out once in a process."""
    try:
        package = importlib.import_module("kernels")
    except ImportError as error:
        return f"needs the `kernels` package, which cannot be imported ({error}); pip install kernels"
    try:
        found = package.get_kernel(repository.name, version=repository.version).flash_attn_interface
    # Its own errors, those of the Hub's client, and whatever a library built for another PyTorch fails with.
    except Exception as error:
        return f"cannot be loaded by `kernels` ({error})"
    # Builds from before these were operators take other arguments under the same names.
    lacking = [name for name in repository.functions if not isinstance(getattr(found, name, None), torch.library.CustomOpDef)]
    return f"has no operator {', '.join(lacking)} in this build" if lacking else found
