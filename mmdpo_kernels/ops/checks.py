"""Argument checks shared by the ops. Every message names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_tensor(op: str, name: str, value: object, shape: Sequence[int | str], *, floating: bool | None = None) -> None:
    """`shape` holds sizes, or letters where any size will do."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor of shape {_show(shape)}, got {type(value).__name__}")
    fits = value.ndim == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, value.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{op}: {name} must have shape {_show(shape)}, got {tuple(value.shape)}")
    if floating is not None and value.dtype.is_floating_point != floating:
        raise TypeError(f"{op}: {name} must be {'a floating' if floating else 'an integer'} tensor, got {value.dtype}")


def check_heads(op: str, query: Tensor, key: Tensor) -> None:
    """Same dtype, device, head dim; query heads a multiple of key/value heads."""
    if key.shape[1] == 0 or query.shape[-1] == 0:
        raise ValueError(f"{op}: key needs at least one head and one element a head, got shape {tuple(key.shape)}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{op}: query heads must be a multiple of key heads, got {query.shape[1]} and {key.shape[1]}")
    if query.dtype != key.dtype:
        raise TypeError(f"{op}: query and key must have one dtype, got {query.dtype} and {key.dtype}")
    if query.device != key.device:
        raise ValueError(f"{op}: query and key must be on one device, got {query.device} and {key.device}")


def check_devices(op: str, query: Tensor, **others: Tensor | None) -> None:
    """All on the query's device: a kernel follows addresses."""
    for name, tensor in others.items():
        if isinstance(tensor, Tensor) and tensor.device != query.device:
            raise ValueError(f"{op}: {name} must be on the query's device {query.device}, got {tensor.device}")


def check_segments(op: str, segments: Tensor | None, num_segments: int, batch: int, length: int) -> None:
    """(B, S) integers below num_segments; needed exactly when num_segments > 0."""
    if num_segments < 0:
        raise ValueError(f"{op}: num_segments must be >= 0, got {num_segments}")
    if segments is None:
        if num_segments:
            raise ValueError(f"{op}: num_segments={num_segments} needs segments of shape ({batch}, {length}), got None")
        return
    check_tensor(op, "segments", segments, (batch, length), floating=False)
    check_range(op, "segments", segments, -1, num_segments)


def check_range(op: str, name: str, values: Tensor, low: int, high: int) -> None:
    """Every entry in [low, high). Looked at on the CPU only: on a GPU it would wait for the device. Traced code has no values yet."""
    if values.device.type != "cpu" or torch.compiler.is_compiling() or values.numel() == 0:
        return
    least, most = int(values.min()), int(values.max())
    if least < low or most >= high:
        raise ValueError(f"{op}: {name} must be in [{low}, {high}), got {least if least < low else most}")


def check_tree_end(op: str, tree_end: Tensor | None, batch: int, length: int) -> None:
    """(B, S) integers."""
    if tree_end is not None:
        check_tensor(op, "tree_end", tree_end, (batch, length), floating=False)


def check_reach(op: str, reach: Tensor | None, tree_end: Tensor | None, batch: int, length: int) -> None:
    """(B, S) integers. Values are looked at where `check_range` would: at least i + 1 and at most S where token i is seen, and no key that
    is hidden by another `tree_end` than 0, as a query before it could reach it."""
    if reach is None:
        return
    check_tensor(op, "reach", reach, (batch, length), floating=False)
    if reach.device.type != "cpu" or torch.compiler.is_compiling():
        return
    index = torch.arange(length)
    wrong = (reach <= index) | (reach > length)
    if tree_end is not None:
        half_hidden = (tree_end > 0) & (tree_end <= index)
        if half_hidden.any():
            row, key = half_hidden.nonzero()[0].tolist()
            raise ValueError(
                f"{op}: with reach, a hidden key's tree_end must be 0, got tree_end[{row}, {key}] = {int(tree_end[row, key])}"
            )
        wrong &= tree_end > index
    if wrong.any():
        row, query = wrong.nonzero()[0].tolist()
        raise ValueError(f"{op}: reach[{row}, {query}] must be in [{query + 1}, {length}], got {int(reach[row, query])}")


def check_positive(op: str, **values: float | None) -> None:
    """Each value None or above zero."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{op}: {name} must be above 0 or None, got {value}")


def default_scale(scale: float | None, head_dim: int) -> float:
    """1 / sqrt(D) unless given."""
    return head_dim**-0.5 if scale is None else float(scale)


def _show(shape: Sequence[int | str]) -> str:
    return "(" + ", ".join(str(size) for size in shape) + ")"


def grad_or_none(tensor: Tensor | None) -> Tensor | None:
    """A contiguous gradient for the backends, or None where nothing flowed back."""
    return None if tensor is None else tensor.contiguous()
