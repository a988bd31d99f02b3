"""`make wheels`: the sdist, and from it a CPU wheel and, where nvcc is, a CUDA wheel, for each Python that is found.

    python -m benchmarks.delivery.wheels                                         # into dist/
    python -m benchmarks.delivery.wheels --python python3.12 ~/3.13/bin/python   # those instead of whatever is on the PATH
    python -m benchmarks.delivery.wheels --kind cpu --output build/wheels/tried  # the result file goes there too

Every wheel is built from the sdist, linked for an old glibc (`link_command` in setup.py), tagged by `auditwheel repair`, which refuses
what such a system lacks, and computed with.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from benchmarks.delivery import environments, without_torch
from benchmarks.delivery.environments import PROJECT, Failed, run
from benchmarks.delivery.page import wheels_table
from benchmarks.measure import ROOT, machine, place_of
from benchmarks.progress import Steps, steps

GLIBC = "2.28"
PLATFORM = f"manylinux_{GLIBC.replace('.', '_')}_{platform.machine()}"
BUILD = ROOT / "build" / "wheels"
# What a wheel may ask of the system that it is installed in, beside glibc: torch needs it too.
ALLOWED = re.compile(r"ld-linux|lib(c|m|dl|rt|pthread|gcc_s)\.so")
KINDS = ("cpu", "cuda")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    arguments = _parser().parse_args(argv)
    pythons = environments.interpreters(arguments.python or environments.PYTHONS)
    if not pythons:
        raise SystemExit(f"none of {', '.join(arguments.python or environments.PYTHONS)} runs here; name one: --python PROGRAM")
    release = cuda_release()
    kinds = [kind for kind in KINDS if kind in (arguments.kind or KINDS) and (kind == "cpu" or release)]
    if not kinds:
        raise SystemExit("a CUDA wheel needs nvcc, on the PATH or in CUDA_HOME")
    place = place_of(arguments, part=set(kinds) != set(KINDS))
    target = ROOT / "dist" if arguments.output is None else place.folder
    with steps(2 + len(pythons) * len(kinds)) as progress:
        progress.say("zig, auditwheel")
        tools = environments.make(
            next(iter(pythons.values())), BUILD / "tools", [*PROJECT["dependency-groups"]["wheels"], *_build_needs()]
        )
        progress.step("tools are there")
        sdist = make_sdist(tools, target)
        progress.step(f"{sdist.name}: {sdist.stat().st_size:,} bytes")
        rows = [
            _wheel(tools, sdist, target, program, version, kind, release, progress)
            for kind in kinds
            for version, program in pythons.items()
        ]
    result = {
        "machine": machine(),
        "processors": os.cpu_count(),
        "glibc": GLIBC,
        "sdist": {"file": sdist.name, "bytes": sdist.stat().st_size},
        "wheels": rows,
    }
    place.result("wheels", result)
    place.section("docs/installing.md", "wheels", wheels_table(result))
    return 0


def cuda_release() -> str | None:
    """What nvcc says that it is, as 13.0; None where there is none."""
    homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*map(str, homes), os.environ.get("PATH", "")]))
    found = re.search(r"release (\d+\.\d+)", run([nvcc, "--version"])) if nvcc else None
    return found.group(1) if found else None


def make_sdist(tools: Path, target: Path) -> Path:
    """The source distribution, in `target`; what lay there of this project is removed."""
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("mmdpo_kernels-*"):
        old.unlink()
    hook = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    return target / run([tools, "-c", hook, target], folder=ROOT).splitlines()[-1]


def build(tools: Path, sdist: Path, python: Path, kind: str, release: str | None, folder: Path) -> tuple[Path, str]:
    """One wheel with the tag of this machine alone, and what the build said. python: with what the build needs installed."""
    local = f"cu{(release or '').replace('.', '')}" if kind == "cuda" else ""
    environment = {
        "MMDPO_GLIBC": GLIBC,
        "MMDPO_CUDA": "1" if kind == "cuda" else "0",
        "MMDPO_LOCAL_VERSION": local,
        "PATH": f"{tools.parent}{os.pathsep}{os.environ['PATH']}",
        "ZIG_GLOBAL_CACHE_DIR": str(BUILD / "zig"),
    }
    command = [python, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", folder, sdist]
    said = run(command, environment=environment)
    (wheel,) = folder.glob("*.whl")
    version = PROJECT["project"]["version"] + (f"+{local}" if local else "")
    if wheel.name.split("-")[1] != version:
        raise Failed(f"{wheel.name} was built, with another version than {version}")
    return wheel, said


def checked(wheel: Path, tools: Path, python: Path, folder: Path) -> dict[str, Any]:
    """What a tagged wheel asks of a system, and what it has code for. Raises `Failed` where an old system lacks something of it."""
    shown = json.loads(run([tools.parent / "auditwheel", "show", "--json", wheel]))
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".so")]
        extension = Path(archive.extract(name, folder))
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run(["readelf", "-d", extension]))
    if wrong := [name for name in needed if not ALLOWED.match(name)]:
        raise Failed(f"{wheel.name} links {', '.join(wrong)}")
    if unversioned := unknown_symbols(run(["readelf", "-W", "--dyn-syms", extension])):
        raise Failed(f"{wheel.name} calls what glibc {GLIBC} lacks: {', '.join(unversioned)}")
    targets = json.loads(run([python, without_torch.__file__, extension]))["cuda_targets"]
    return {"platform": shown["overall_tag"], "symbols": shown["versioned_symbols"], "needs": needed, "cuda_targets": targets}


def unknown_symbols(listed: str) -> list[str]:
    """Undefined symbols that no library gave a version to, Python's own aside: the linker found them nowhere, and auditwheel passes them.

    listed: the output of readelf --dyn-syms.
    """
    names = re.findall(r" GLOBAL +DEFAULT +UND +(\S+)", listed)
    return [name for name in names if "@" not in name and not re.match(r"_?Py", name)]


def _wheel(
    tools: Path, sdist: Path, target: Path, program: str, version: str, kind: str, release: str | None, progress: Steps
) -> dict[str, Any]:
    progress.say(f"{kind} wheel for Python {version}")
    python = environments.make(program, BUILD / f"python{version}", [*_build_needs(), "numpy"])
    with tempfile.TemporaryDirectory(dir=BUILD) as name:
        folder = Path(name)
        started = time.perf_counter()
        raw, said = build(tools, sdist, python, kind, release, folder)
        seconds = time.perf_counter() - started
        left_out = re.findall(r"it does not know ([\w, ]+)", said)
        path = {"PATH": f"{tools.parent}{os.pathsep}{os.environ['PATH']}"}
        repaired = folder / "repaired"
        run([tools.parent / "auditwheel", "repair", "--only-plat", "--plat", PLATFORM, "-w", repaired, raw], environment=path)
        (wheel,) = repaired.glob("*.whl")
        found = checked(wheel, tools, python, folder)
        shutil.move(wheel, target / wheel.name)
    wheel = target / wheel.name
    progress.step(f"{wheel.name}: {wheel.stat().st_size:,} bytes, {seconds:.0f} s")
    return {
        "file": wheel.name,
        "kind": kind,
        "python": version,
        "cuda": release if kind == "cuda" else None,
        "bytes": wheel.stat().st_size,
        "seconds": round(seconds),
        "left_out": left_out[0].split(", ") if left_out else [],
        **found,
    }


def _build_needs() -> list[str]:
    return list(PROJECT["build-system"]["requires"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.delivery.wheels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--python", nargs="+", metavar="PROGRAM", help="Pythons to build for (default: python3.11 and newer on the PATH)"
    )
    parser.add_argument("--kind", nargs="+", choices=KINDS, help="default: cpu, and cuda where nvcc is")
    parser.set_defaults(small=False)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where wheels and the result go in place of dist/, benchmarks/results and the page",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
