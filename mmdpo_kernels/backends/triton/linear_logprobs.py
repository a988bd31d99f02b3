"""`linear_logprobs` with its rows of logits in Triton and its matrix products by PyTorch."""

from __future__ import annotations

import torch

from ..chunked.row_chunks import RowChunks
from . import logit_rows, runtime


def unavailable_reason(device_type: str, dtype: torch.dtype, **features: object) -> str | None:
    """None, or why this backend cannot serve tensors of `dtype` on `device_type`. It serves every feature."""
    return runtime.unavailable_reason(device_type, dtype)


_chunks = RowChunks(logit_rows)
forward = _chunks.forward
forward_with_gradient = _chunks.forward_with_gradient
logit_dtype = _chunks.logit_dtype
empty_kept = _chunks.empty_kept
backward_kept = _chunks.backward_kept
backward = _chunks.backward
