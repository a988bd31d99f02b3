"""Builds `mmdpo_kernels._native` from csrc/ with ninja; everything else is in pyproject.toml.

Environment: CXX, CXXFLAGS, LDFLAGS; CUDA_HOME or CUDA_PATH where nvcc is not on the PATH; MMDPO_CUDA=0 leaves the CUDA half out.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra", "-pthread"]
# No other source may use these: the wheel must run on a CPU that lacks them.
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]
LEVEL_FLAGS = {"avx2": AVX2, "avx512": AVX512, "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]}
# Code for each GPU architecture, and of the newest also PTX, which later GPUs compile for themselves.
CUDA_TARGETS = ["sm_80", "sm_90", "sm_100"]
CUDA_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden,-pthread", "-Xptxas=-v", "--threads=0"]
REMEDY = (
    "building mmdpo_kernels._native needs a C++17 compiler (GCC 10 or newer, Clang 14 or newer): install g++, for example "
    "`apt-get install g++`, or name another one in the environment variable CXX"
)


class NinjaBuild(build_ext):
    """Writes a build.ninja beside the objects and lets ninja compile and link."""

    def build_extensions(self) -> None:
        for extension in self.extensions:
            self._build(extension, Path(self.get_ext_fullpath(extension.name)).resolve())

    def _build(self, extension: Extension, target: Path) -> None:
        compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
        if shutil.which(compiler[0]) is None:
            raise CompileError(f"{compiler[0]} was not found; {REMEDY}")
        nvcc = find_nvcc()
        if nvcc is None:
            print("mmdpo_kernels: building the CPU half: MMDPO_CUDA=0, or no nvcc on the PATH nor in CUDA_HOME", flush=True)
        else:
            check_host_compiler(nvcc, compiler)
            print(f"mmdpo_kernels: building for the CPU and, with {nvcc}, for {', '.join(CUDA_TARGETS)}", flush=True)
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        sources = [ROOT / name for name in extension.sources if nvcc is not None or not name.endswith(".cu")]
        sources, defines = compilable(compiler, sources)
        (folder / "build.ninja").write_text(ninja_file(compiler, nvcc, sources, target, defines))
        try:
            subprocess.run([*ninja_command(), "-C", str(folder)], check=True)
        except subprocess.CalledProcessError as error:
            used = " ".join(compiler) + ("" if nvcc is None else f" or {nvcc} (which MMDPO_CUDA=0 leaves out)")
            raise CompileError(f"{used} failed, see its message above; {REMEDY}") from error


def ninja_command() -> list[str]:
    """The ninja package of this Python, else the program on the PATH."""
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    found = shutil.which("ninja")
    if found is None:
        raise CompileError("building mmdpo_kernels._native needs ninja: `pip install ninja`, or put the program on the PATH")
    return [found]


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME or CUDA_PATH, else of the PATH; None where there is none, or MMDPO_CUDA=0."""
    if os.environ.get("MMDPO_CUDA", "1") == "0":
        return None
    for name in ("CUDA_HOME", "CUDA_PATH"):
        nvcc = Path(os.environ.get(name, "")) / "bin" / "nvcc"
        if os.environ.get(name) and nvcc.is_file():
            return nvcc
    found = shutil.which("nvcc")
    return None if found is None else Path(found)


def check_host_compiler(nvcc: Path, compiler: list[str]) -> None:
    """nvcc knows which host compilers it supports, and says so when it preprocesses anything."""
    command = [str(nvcc), "-ccbin", compiler[0], "-x", "cu", "-E", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line.lower()), done.stderr.strip())
        raise CompileError(
            f"{nvcc} does not work with {compiler[0]}: {first}\nName a host compiler it supports in the environment variable CXX, "
            "or set MMDPO_CUDA=0 to build without CUDA"
        )


def cuda_codes() -> list[str]:
    """-gencode for each of CUDA_TARGETS."""
    numbers = [name.removeprefix("sm_") for name in CUDA_TARGETS]
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    return [*codes, f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"]


def cuda_library(nvcc: Path) -> Path:
    """Folder of the static CUDA runtime, as nvcc itself would link it."""
    done = subprocess.run([str(nvcc), "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    line = next((line for line in done.stderr.splitlines() if "LIBRARIES=" in line), "")
    folders = [Path(word.removeprefix("-L")) for word in shlex.split(line.partition("LIBRARIES=")[2]) if word.startswith("-L")]
    for folder in folders:
        if (folder / "libcudart_static.a").is_file():
            return folder.resolve()
    raise CompileError(
        f"{nvcc} has no libcudart_static.a beside it; install the CUDA runtime's static library, or set MMDPO_CUDA=0"
    )


def ninja_file(compiler: list[str], nvcc: Path | None, sources: list[Path], target: Path, defines: list[str]) -> str:
    """The build of `target` from `sources`, headers tracked."""
    import pybind11

    includes = [f"-I{CSRC}", f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    flags = FLAGS + defines + includes + shlex.split(os.environ.get("CXXFLAGS", ""))
    libraries = []
    if nvcc is not None:
        flags.append(f'-DMMDPO_CUDA_TARGETS="{",".join(CUDA_TARGETS)}"')
        libraries = [f"-L{cuda_library(nvcc)}", "-lcudart_static", "-ldl", "-lrt"]
    lines = [
        f"cxx = {_shell(compiler)}",
        f"flags = {_shell(flags)}",
        f"ldflags = {_shell(['-shared', '-pthread', *shlex.split(os.environ.get('LDFLAGS', '')), *libraries])}",
        "rule compile\n  command = $cxx $flags $level -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = $cxx $in $ldflags -o $out",
    ]
    if nvcc is not None:
        cuda_flags = [*CUDA_FLAGS, *cuda_codes(), "-ccbin", compiler[0], f"-I{CSRC}"]
        lines += [
            f"nvcc = {_shell([str(nvcc)])}",
            f"cuda_flags = {_shell(cuda_flags)}",
            "rule compile_cuda\n  command = $nvcc $cuda_flags -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        ]
    for source in sources:
        if source.suffix == ".cu":
            lines.append(f"build {source.stem}.o: compile_cuda {_escape(source)}")
        else:
            lines.append(f"build {source.stem}.o: compile {_escape(source)}\n  level = {_shell(level_flags(source))}")
    lines.append(f"build {_escape(target)}: link {' '.join(f'{source.stem}.o' for source in sources)}")
    return "\n".join(lines) + "\n"


def level_of(source: Path) -> str:
    """The SIMD level that a source is named after, if it is."""
    return source.stem.rpartition("_")[2]


def level_flags(source: Path) -> list[str]:
    """What a source named after a SIMD level is compiled with; nothing for all others."""
    return LEVEL_FLAGS.get(level_of(source), [])


def compilable(compiler: list[str], sources: list[Path]) -> tuple[list[Path], list[str]]:
    """Those without the level amx where the compiler is too old for it, and the flags that tell all of them what there is."""
    if all(level_of(source) != "amx" for source in sources):
        return sources, []
    command = [*compiler, *LEVEL_FLAGS["amx"], "-x", "c++", "-c", "-", "-o", os.devnull]
    probe = "#include <immintrin.h>\nvoid release() { _tile_release(); }\n"
    if subprocess.run(command, input=probe, capture_output=True, text=True, check=False).returncode == 0:
        return sources, ["-DMMDPO_AMX"]
    print(f"mmdpo_kernels: building without the CPU level amx, which {' '.join(compiler)} is too old for", flush=True)
    return [source for source in sources if level_of(source) != "amx"], []


def native_sources() -> list[str]:
    """The *.cpp of csrc/, those of x86 SIMD levels only where the machine is one, and the *.cu, which are compiled where there is nvcc."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sources = sorted(CSRC.rglob("*.cu")) + sorted(CSRC.rglob("*.cpp"))
    return [str(path.relative_to(ROOT)) for path in sources if x86 or not level_flags(path)]


def _shell(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    packages=find_packages(include=["mmdpo_kernels", "mmdpo_kernels.*"]) + find_packages("trainers"),
    package_dir={"mmdpo_kernels": "mmdpo_kernels", "mmdpo_trainers": "trainers/mmdpo_trainers"},
    ext_modules=[
        Extension(
            "mmdpo_kernels._native",
            sources=native_sources(),
            depends=[str(path.relative_to(ROOT)) for ending in ("h", "inl", "cuh") for path in sorted(CSRC.rglob(f"*.{ending}"))],
        )
    ],
    cmdclass={"build_ext": NinjaBuild},
)
