"""The compiled half of a wheel where there is no torch to import the package with: computed from NumPy's arrays.

    python benchmarks/delivery/without_torch.py [FILE]    # the extension, or else that of the wheel that is installed

Run in environments with NumPy. Says what it found, or ends with a traceback.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

SIZES = (1, 2, 1, 7, 16)  # B, Hq, Hkv, S, D
TREE_END = np.array([7, 7, 7, 5, 5, 7, 7], np.int32)  # a shared trunk of three tokens, branches of two


def main() -> None:
    (file,) = sys.argv[1:] or (Path(sysconfig.get_path("purelib")) / "mmdpo_kernels").glob("_native*.so")
    spec = importlib.util.spec_from_file_location("mmdpo_kernels._native", file)
    assert spec is not None and spec.loader is not None
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    off = largest_error(native)
    assert off < 1e-6, off
    os.environ["MMDPO_CPU_LEVEL"] = "unheard of"
    try:
        largest_error(native)
    except ValueError as error:
        assert "MMDPO_CPU_LEVEL" in str(error), error
    else:
        raise AssertionError("an unknown level was no error")
    print(json.dumps({"off": off, "cuda_targets": native.cuda_targets}))


def largest_error(native: Any) -> float:
    """Of `tree_attention` against NumPy's softmax in float64."""
    batch, heads, key_heads, length, dim = SIZES
    draw = np.random.default_rng(0)
    query = draw.standard_normal((batch, heads, length, dim), np.float32)
    key, value = (draw.standard_normal((batch, key_heads, length, dim), np.float32) for _ in range(2))
    output = np.full_like(query, np.nan)
    lse = np.full(query.shape[:3], np.nan, np.float32)
    native.tree_attention_forward(
        sizes=SIZES,
        dtype=native.dtypes.index("float32"),
        query=_heads(query),
        key=_heads(key),
        value=_heads(value),
        tree_end=TREE_END.ctypes.data,
        reach=0,
        scale=dim**-0.5,
        num_threads=1,
        output=_heads(output),
        lse=lse.ctypes.data,
    )
    places = np.arange(length)
    seen = (places[None, :] <= places[:, None]) & (places[:, None] < TREE_END[None, :])
    scores = np.where(seen, query.astype(np.float64) @ key.astype(np.float64).swapaxes(-1, -2) * dim**-0.5, -np.inf)
    weights = np.exp(scores)
    return float(np.abs(weights / weights.sum(-1, keepdims=True) @ value - output).max())


def _heads(array: np.ndarray) -> tuple[int, tuple[int, ...]]:
    """Address, and strides in elements."""
    return array.ctypes.data, tuple(stride // array.itemsize for stride in array.strides[:3])


if __name__ == "__main__":
    main()
