"""What a machine with a GPU but no network lacks of the peers, laid into a folder that travels with the source tree: `make gpu-peers`.

    python -m benchmarks.gpu.peers [--python 3.12] [--folder build/gpu_peers]

TRL and Liger, and what TRL's `DPOTrainer` needs beside PyTorch, transformers, accelerate, PEFT, PyArrow and pandas, which are to be there:
pure Python, in the versions of constraints.txt, for the Python of that machine. `python benchmarks/gpu` puts the folder last on its path and
says in its first phase what there is. FlashAttention 3 and cuDNN's front end are compiled for a machine: they are compared where they are
installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "gpu_peers"
PACKAGES = ("trl", "datasets", "dill", "multiprocess", "liger-kernel")
LARGEST = 64 << 20
"""Bytes that the folder may have."""
# Each may be on the machine or in the folder; names that are imported.
LOOKED_FOR = ("trl", "datasets", "liger_kernel", "peft", "pyarrow", "flash_attn", "flash_attn_interface", "cudnn")


def present() -> dict[str, str]:
    """Of each peer and of what TRL needs, where it is imported from, or that it is not there."""
    found = {}
    for name in LOOKED_FOR:
        spec = importlib.util.find_spec(name)
        ours = spec is not None and str(FOLDER) in str(spec.origin)
        found[name] = "absent" if spec is None else f"from {FOLDER.relative_to(ROOT)}" if ours else "installed"
    return found


def versions(folder: Path = FOLDER) -> list[str]:
    """Names and versions of what the folder holds; empty where there is none."""
    return sorted(path.name.removesuffix(".dist-info") for path in folder.glob("*.dist-info"))


def size(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", metavar="VERSION", help="of the machine with the GPU (default 3.12)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="made anew (default build/gpu_peers)")
    arguments = parser.parse_args(argv)
    if not re.fullmatch(r"3\.\d+", arguments.python):
        parser.error(f"--python: expected a version as 3.12, got {arguments.python}")
    folder: Path = arguments.folder
    if folder.exists() and any(folder.iterdir()) and not versions(folder):
        parser.error(f"--folder: {folder} holds something else; name an empty folder, or one that is not there")
    shutil.rmtree(folder, ignore_errors=True)
    # The whole list by name: what they need beside it is on the machine, in versions of its own.
    options = ["--quiet", "--no-deps", "--no-compile", "--only-binary=:all:", "--constraint", str(ROOT / "constraints.txt")]
    target = ["--python-version", arguments.python, "--implementation", "cp", "--target", str(folder)]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *options, *target, *PACKAGES])
    if done.returncode:
        return done.returncode
    # Commands start with the path of the interpreter that made them.
    shutil.rmtree(folder / "bin", ignore_errors=True)
    compiled = [str(path) for path in folder.rglob("*.so")]
    if compiled or size(folder) > LARGEST:
        print(f"{folder}: {size(folder) >> 20} MB, compiled for one machine: {', '.join(compiled) or 'nothing'}", file=sys.stderr)
        return 1
    print(f"{folder}: {', '.join(versions(folder))}; {size(folder) / (1 << 20):.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
