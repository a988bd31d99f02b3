"""Builds `mmdpo_kernels._native` from csrc/ with ninja; everything else is in pyproject.toml.

Environment: CXX, CXXFLAGS, LDFLAGS; CUDA_HOME or CUDA_PATH where nvcc is not on the PATH; MMDPO_CUDA=0 leaves the CUDA half out.
For wheels: MMDPO_GLIBC=2.28 links for that glibc and newer ones, MMDPO_LOCAL_VERSION=cu130 makes the version 0.1.0+cu130.
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
from setuptools.command.egg_info import egg_info
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra", "-pthread"]
# No other source may use these: the wheel must run on a CPU that lacks them.
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]
LEVEL_FLAGS = {"avx2": AVX2, "avx512": AVX512, "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]}
# Code for each GPU architecture, and of the newest also PTX, which later GPUs compile for themselves. An older nvcc knows fewer.
CUDA_TARGETS = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"]
CUDA_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden,-pthread", "-Xptxas=-v", "--threads=0"]
# Linked by name where MMDPO_GLIBC is set, see `link_command`. The first has what `__builtin_cpu_supports` reads, as this compiler lays
# it out, and so comes before zig's own. The last is in every system: exceptions of all libraries in a process are best unwound by one.
OF_THE_COMPILER = ("libgcc.a", "libstdc++.a", "libgcc_s.so.1")
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
            targets, left_out = cuda_targets(nvcc)
            unknown = f"; it does not know {', '.join(left_out)}" if left_out else ""
            print(f"mmdpo_kernels: building for the CPU and, with {nvcc}, for {', '.join(targets)}{unknown}", flush=True)
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        sources = [ROOT / name for name in extension.sources if nvcc is not None or not name.endswith(".cu")]
        sources, defines = compilable(compiler, sources)
        link = link_command(compiler, folder)
        (folder / "build.ninja").write_text(ninja_file(compiler, link, nvcc, sources, target, defines))
        try:
            subprocess.run([*ninja_command(), "-C", str(folder)], check=True)
        except subprocess.CalledProcessError as error:
            used = " ".join(compiler) + ("" if nvcc is None else f" or {nvcc} (which MMDPO_CUDA=0 leaves out)")
            raise CompileError(f"{used} failed, see its message above; {REMEDY}") from error


class LocalVersion(egg_info):
    """Without it a CUDA wheel and a CPU wheel of one release have one file name."""

    def finalize_options(self) -> None:
        local = os.environ.get("MMDPO_LOCAL_VERSION")
        if local:
            self.tag_build = f"+{local}"
        super().finalize_options()


def ninja_command() -> list[str]:
    """The ninja package of this Python, else the program on the PATH."""
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    found = shutil.which("ninja")
    if found is None:
        raise CompileError("building mmdpo_kernels._native needs ninja: `pip install ninja`, or put the program on the PATH")
    return [found]


def link_command(compiler: list[str], folder: Path) -> list[str]:
    """What links, less objects, libraries of the CUDA half and output. folder: for the list of exported symbols.

    With MMDPO_GLIBC it is zig's linker. The compiler binds each symbol to the newest version that the glibc of this machine has; zig comes
    with the symbols of every glibc, so that one build serves old systems without a container, and the compiler, which nvcc knows
    as its host compiler and with which everything is tested, stays the same. An old system's libstdc++ lacks what this compiler's headers
    call, so that library is linked in, hidden.
    """
    glibc = os.environ.get("MMDPO_GLIBC", "")
    if not glibc:
        return [*compiler, "-shared", "-pthread"]
    if importlib.util.find_spec("ziglang") is not None:
        zig = [sys.executable, "-m", "ziglang"]
    elif (found := shutil.which("python-zig")) is not None:
        zig = [found]
    else:
        raise CompileError("MMDPO_GLIBC links with zig: `pip install ziglang`, or put its program python-zig on the PATH")
    exported = folder / "exported.map"
    exported.write_text("{ global: PyInit__native; local: *; };\n")
    target = f"{platform.machine()}-linux-gnu.{glibc}"
    flags = ["-shared", "-s", f"-Wl,--version-script={exported}", "-Wl,--gc-sections"]
    return [*zig, "cc", "-target", target, *flags, "-lpthread", "-lm", *(_library(compiler, name) for name in OF_THE_COMPILER)]


def _library(compiler: list[str], name: str) -> str:
    """Path of a library that comes with the compiler."""
    found = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_file():
        raise CompileError(f"{compiler[0]} has no {name}, which a build with MMDPO_GLIBC links; install it, or name g++ in CXX")
    return found


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


def cuda_targets(nvcc: Path) -> tuple[list[str], list[str]]:
    """CUDA_TARGETS that this nvcc makes code for, and those that it does not know."""
    listed = subprocess.run([str(nvcc), "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    # The list has no name that ends in "a", for what one generation alone can do; nvcc takes it where it knows the generation.
    known = [name for name in CUDA_TARGETS if name.removesuffix("a") in listed]
    if not known:
        raise CompileError(
            f"{nvcc} makes code for none of {', '.join(CUDA_TARGETS)}; name a newer one in CUDA_HOME, or set MMDPO_CUDA=0"
        )
    return known, [name for name in CUDA_TARGETS if name not in known]


def cuda_codes(targets: list[str]) -> list[str]:
    """-gencode for each of `targets`."""
    numbers = [name.removeprefix("sm_") for name in targets]
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    newest = numbers[-1].removesuffix("a")  # PTX for what one generation alone can do, no later GPU takes
    return [*codes, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


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


def ninja_file(
    compiler: list[str], link: list[str], nvcc: Path | None, sources: list[Path], target: Path, defines: list[str]
) -> str:
    """The build of `target` from `sources`, headers tracked. link: see `link_command`."""
    import pybind11

    includes = [f"-I{CSRC}", f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    flags = FLAGS + defines + includes + shlex.split(os.environ.get("CXXFLAGS", ""))
    libraries: list[str] = []
    targets: list[str] = []
    if nvcc is not None:
        targets, _ = cuda_targets(nvcc)
        flags.append(f'-DMMDPO_CUDA_TARGETS="{",".join(targets)}"')
        libraries = [f"-L{cuda_library(nvcc)}", "-lcudart_static", "-ldl", "-lrt"]
    lines = [
        f"cxx = {_shell(compiler)}",
        f"flags = {_shell(flags)}",
        f"link = {_shell(link)}",
        f"ldflags = {_shell([*shlex.split(os.environ.get('LDFLAGS', '')), *libraries])}",
        "rule compile\n  command = $cxx $flags $level -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = $link $in $ldflags -o $out",
    ]
    if nvcc is not None:
        cuda_flags = [*CUDA_FLAGS, *cuda_codes(targets), "-ccbin", compiler[0], f"-I{CSRC}"]
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
    cmdclass={"build_ext": NinjaBuild, "egg_info": LocalVersion},
)
