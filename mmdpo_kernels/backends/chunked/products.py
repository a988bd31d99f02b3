"""The three matrix products of a head, accumulated in float32 at least."""

from __future__ import annotations

import torch
from torch import Tensor

# PyTorch's half-precision products on a CPU without instructions for them are far slower than float32 ones. There the weight is widened
# this many rows at a time.
SLICE = 4096


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """out (R, V) = hidden (R, H) @ weight.T (V, H) + bias (V,), rounded once."""
    if not _widens(hidden):
        if bias is None:
            torch.mm(hidden, weight.T, out=out)
        else:
            torch.addmm(bias, hidden, weight.T, out=out)
        return
    wide = hidden.float()
    for columns in _slices(weight):
        part = wide @ weight[columns].float().T
        out[:, columns] = part if bias is None else part.add_(bias[columns])


def weighted_rows(coefficients: Tensor, weight: Tensor) -> Tensor:
    """(R, V) @ (V, H) -> (R, H) in float32 or wider."""
    if _widens(weight):
        sums = coefficients.new_zeros(coefficients.shape[0], weight.shape[1], dtype=torch.float32)
        for columns in _slices(weight):
            sums.addmm_(coefficients[:, columns].float(), weight[columns].float())
        return sums
    if weight.dtype in (torch.float32, torch.float64):
        return coefficients @ weight
    return torch.mm(coefficients, weight, out_dtype=torch.float32)


def add_weight_gradient(sums: Tensor, coefficients: Tensor, rows: Tensor, factor: Tensor) -> None:
    """sums (V, H) += factor * coefficients.T (V, R) @ rows (R, H); sums in float32 or wider, factor a scalar."""
    for columns in _slices(sums):
        part = coefficients[:, columns].T
        sums[columns].addcmul_(weighted_rows(part.contiguous() if _widens(rows) else part, rows), factor)


def _widens(tensor: Tensor) -> bool:
    return tensor.device.type != "cuda" and tensor.dtype in (torch.float16, torch.bfloat16)


def _slices(weight: Tensor) -> list[slice]:
    return [slice(start, start + SLICE) for start in range(0, weight.shape[0], SLICE)]
