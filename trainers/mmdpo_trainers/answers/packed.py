"""Numbers by layer and head group as a short text, for a field of a JSON line."""

from __future__ import annotations

import base64

import numpy as np


def packed(shares: np.ndarray) -> str:
    """(L, G) shares as base64 of little-endian float16, row by row. 1,024 of them are 2.7 kB, a third of what three digits each would be."""
    return base64.b64encode(shares.astype("<f2").tobytes()).decode()


def unpacked(text: str, layers: int) -> np.ndarray:
    """(L, G) float32 of what `packed` made; NaN where a head gave the pictures nothing."""
    return np.frombuffer(base64.b64decode(text), "<f2").reshape(layers, -1).astype(np.float32)
