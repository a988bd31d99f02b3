"""`linear_logprobs` chunk of rows by chunk of rows in plain PyTorch."""

from __future__ import annotations

import torch

from . import logit_rows
from .row_chunks import RowChunks


def unavailable_reason(device_type: str, dtype: torch.dtype, **features: object) -> str | None:
    """None: plain PyTorch runs everywhere."""
    return None


_chunks = RowChunks(logit_rows)
forward = _chunks.forward
forward_with_gradient = _chunks.forward_with_gradient
logit_dtype = _chunks.logit_dtype
empty_kept = _chunks.empty_kept
backward_kept = _chunks.backward_kept
backward = _chunks.backward
