"""Builds `mmdpo_kernels._native` from csrc/ with ninja; everything else is in pyproject.toml."""

from __future__ import annotations

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
LEVEL_FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"],
}
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
        print("mmdpo_kernels: csrc holds no CUDA sources, building the CPU half", flush=True)
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(compiler, [ROOT / name for name in extension.sources], target))
        try:
            subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)
        except subprocess.CalledProcessError as error:
            raise CompileError(f"{' '.join(compiler)} failed, see its message above; {REMEDY}") from error


def ninja_file(compiler: list[str], sources: list[Path], target: Path) -> str:
    """The build of `target` from `sources`, headers tracked."""
    import pybind11

    includes = [f"-I{CSRC}", f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    flags = FLAGS + includes + shlex.split(os.environ.get("CXXFLAGS", ""))
    lines = [
        f"cxx = {_shell(compiler)}",
        f"flags = {_shell(flags)}",
        f"ldflags = {_shell(['-shared', '-pthread', *shlex.split(os.environ.get('LDFLAGS', ''))])}",
        "rule compile\n  command = $cxx $flags $level -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = $cxx $in $ldflags -o $out",
    ]
    for source in sources:
        lines.append(f"build {source.stem}.o: compile {_escape(source)}\n  level = {_shell(level_flags(source))}")
    lines.append(f"build {_escape(target)}: link {' '.join(f'{source.stem}.o' for source in sources)}")
    return "\n".join(lines) + "\n"


def level_flags(source: Path) -> list[str]:
    """What a source named after a SIMD level is compiled with; nothing for all others."""
    return LEVEL_FLAGS.get(source.stem.rpartition("_")[2], [])


def native_sources() -> list[str]:
    """csrc/*.cpp, those of x86 SIMD levels only where the machine is one."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [str(path.relative_to(ROOT)) for path in sorted(CSRC.glob("*.cpp")) if x86 or not level_flags(path)]


def _shell(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    packages=find_packages(include=["mmdpo_kernels", "mmdpo_kernels.*"])
    + ["mmdpo_trainers", *(f"mmdpo_trainers.{name}" for name in find_packages("trainers"))],
    package_dir={"mmdpo_kernels": "mmdpo_kernels", "mmdpo_trainers": "trainers"},
    ext_modules=[
        Extension(
            "mmdpo_kernels._native",
            sources=native_sources(),
            depends=[str(path.relative_to(ROOT)) for path in sorted([*CSRC.glob("*.h"), *CSRC.glob("*.inl")])],
        )
    ],
    cmdclass={"build_ext": NinjaBuild},
)
