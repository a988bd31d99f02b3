"""The CUDA sources of csrc/ compiled for the CPU by tests/support/cuda_emulation, with the interface of `mmdpo_kernels._native`."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
CSRC, EMULATION = ROOT / "csrc", ROOT / "tests" / "support" / "cuda_emulation"
FLAGS = ["-O2", "-g1", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SOURCES = ["attention_mass.cpp", "emulation.cpp", "faults.cpp", "logit_rows.cpp"]


class Weather(IntEnum):
    """What the hardware is free to choose, see cuda_runtime.h of the emulation."""

    CALM = 0
    ROUGH = 1


def build() -> Path:
    """The shared library in build/, made again where a source has changed. About six seconds."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    sources = sorted(path for folder in (CSRC, EMULATION) for path in folder.rglob("*") if path.is_file())
    digest = hashlib.sha256("\n".join([*compiler, *FLAGS]).encode())
    for path in sources:
        digest.update(path.read_bytes())
    library = ROOT / "build" / "cuda_emulation" / f"{digest.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        command = [*compiler, *FLAGS, f"-I{EMULATION}", f"-I{CSRC}", *(str(EMULATION / name) for name in SOURCES)]
        subprocess.run([*command, "-o", str(unfinished)], check=True)
        unfinished.rename(library)
    return library


class _Args(ctypes.Structure):
    """`AttentionMassArgs` of csrc/attention_mass/attention_mass.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "Hq", "Hkv", "R", "S", "D", "N")),
        ("dtype", ctypes.c_int),
        ("query", ctypes.c_void_p),
        ("query_strides", ctypes.c_int64 * 3),
        ("key", ctypes.c_void_p),
        ("key_strides", ctypes.c_int64 * 3),
        *((name, ctypes.c_void_p) for name in ("segments", "row_positions", "tree_end", "reach", "depth", "lse")),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("window", ctypes.c_int64),
        ("reduce", ctypes.c_int),
        ("num_threads", ctypes.c_int),
        ("out", ctypes.c_void_p),
    ]


class _LogitRowsArgs(ctypes.Structure):
    """`LogitRowsArgs` of csrc/logit_rows/logit_rows_cuda.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "vocabulary", "row_stride")),
        ("dtype", ctypes.c_int),
        ("logits", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        *((name, ctypes.c_double) for name in ("softcap", "logit_scale", "temperature")),
        ("ignore_index", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("logps", "entropy", "max_logp", "is_top1", "mean_logit")),
        ("gradient", ctypes.c_bool),
        ("coefficient_scale", ctypes.c_double),
    ]


class _LogitRowsPlace(ctypes.Structure):
    """`LogitRowsPlace` of csrc/logit_rows/logit_rows_cuda.h."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("device", "multiprocessors", "capability", "shared_bytes")),
        ("stream", ctypes.c_void_p),
    ]


class Division(NamedTuple):
    """How `logit_rows_cuda` divides rows among blocks; `EmulatedNative.division` is that of the last call."""

    ranks: int
    """Blocks a row."""
    held: bool
    """In shared memory."""


class EmulatedNative:
    """The CUDA functions of `mmdpo_kernels._native` over arrays in CPU memory."""

    dtypes = ["float32", "bfloat16", "float16", "float64"]
    reductions = ["none", "mean", "tokens"]

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(build()))
        for function in (
            self._library.emulated_attention_mass,
            self._library.emulated_logit_rows,
            self._library.emulated_fault,
        ):
            function.restype = ctypes.c_char_p

    def set_weather(self, weather: Weather) -> None:
        self._library.emulation_set_weather(int(weather))

    def AttentionMassArgs(self, *, sizes: tuple[int, ...], **values: object) -> _Args:  # noqa: N802
        args = _Args(*sizes)
        for name, value in values.items():
            setattr(args, name, tuple(value) if name.endswith("strides") else value)  # type: ignore[arg-type]
        return args

    def attention_mass_cuda(self, args: _Args, *, multiprocessors: int, out: int) -> None:
        """Over copies of the arrays in guarded memory; the workspace is the emulation's own."""
        args.out = out
        error = self._library.emulated_attention_mass(ctypes.byref(args), multiprocessors).decode()
        if error:
            raise RuntimeError(error)

    def logit_rows_cuda(self, *, sizes: tuple[int, int, int], place: tuple[int, int, int, int], **values: object) -> None:
        """Over copies of the arrays in guarded memory."""
        args = _LogitRowsArgs(*sizes)
        for name, value in values.items():
            if name != "stream":
                setattr(args, name, value)
        found = self._library.emulated_logit_rows(ctypes.byref(args), ctypes.byref(_LogitRowsPlace(*place)))
        if found:
            raise RuntimeError(found.decode())
        self.division = self._division(args, place)

    def logit_rows_division(
        self, sizes: tuple[int, int, int], dtype: torch.dtype, gradient: bool, place: tuple[int, int, int, int]
    ) -> Division:
        args = _LogitRowsArgs(*sizes, dtype=self.dtypes.index(str(dtype).removeprefix("torch.")), gradient=gradient)
        return self._division(args, place)

    def _division(self, args: _LogitRowsArgs, place: tuple[int, int, int, int]) -> Division:
        code = self._library.emulated_logit_rows_division(ctypes.byref(args), ctypes.byref(_LogitRowsPlace(*place)))
        return Division(code % 100, code >= 100)

    def fault(self, kernel: str) -> str:
        """What the launch of one of the kernels of faults.cpp ends with."""
        return self._library.emulated_fault(kernel.encode()).decode()
