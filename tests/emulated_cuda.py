"""The CUDA sources of csrc/ compiled for the CPU by tests/cuda_emulation, with the interface of `mmdpo_kernels._native`."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
from enum import IntEnum
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC, EMULATION = ROOT / "csrc", ROOT / "tests" / "cuda_emulation"
FLAGS = ["-O2", "-g1", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SOURCES = ["attention_mass.cpp", "emulation.cpp", "faults.cpp"]


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
    """`AttentionMassArgs` of csrc/attention_mass.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "Hq", "Hkv", "R", "S", "D", "N")),
        ("dtype", ctypes.c_int),
        ("query", ctypes.c_void_p),
        ("query_strides", ctypes.c_int64 * 3),
        ("key", ctypes.c_void_p),
        ("key_strides", ctypes.c_int64 * 3),
        *((name, ctypes.c_void_p) for name in ("segments", "row_positions", "tree_end", "depth", "lse")),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("window", ctypes.c_int64),
        ("reduce", ctypes.c_int),
        ("num_threads", ctypes.c_int),
        ("out", ctypes.c_void_p),
    ]


class EmulatedNative:
    """`attention_mass_cuda` of `mmdpo_kernels._native` over arrays in CPU memory."""

    dtypes = ["float32", "bfloat16", "float16", "float64"]
    reductions = ["none", "mean", "tokens"]

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(build()))
        for function in (self._library.emulated_attention_mass, self._library.emulated_fault):
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

    def fault(self, kernel: str) -> str:
        """What the launch of one of the kernels of faults.cpp ends with."""
        return self._library.emulated_fault(kernel.encode()).decode()
