"""What a machine has that kernels care about, as Markdown."""

from __future__ import annotations

import shutil
import subprocess

import torch

from benchmarks.gpu import peers
from benchmarks.measure import machine, markdown
from mmdpo_kernels import backends


def report() -> str:
    """Machine, tools and which backend of which op can run."""
    on = machine()
    facts = {
        "GPU": on["gpu"] or "none",
        "compute capability": ".".join(map(str, torch.cuda.get_device_capability())) if on["gpu"] else "",
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "CUDA of torch": torch.version.cuda or "none",
        "nvcc": first_line("nvcc", "--version", containing="release"),
        "compute-sanitizer": first_line("compute-sanitizer", "--version", containing="ersion"),
        "CPU": f"{on['cpu']}, {on['threads']} threads",
        "Python": on["python"],
        **{name: found or "not installed" for name, found in on["packages"].items()},
        "peers that travel": ", ".join(peers.versions()) or "none: `make gpu-peers` lays them out where there is a network",
        **{f"peer {name}": where for name, where in peers.present().items()},
    }
    rows = [[op, name, reason or "can run"] for op, found in backends().items() for name, reason in found.items()]
    return "\n\n".join(
        [markdown(["", ""], [[name, str(fact)] for name, fact in facts.items()]), markdown(["op", "backend", ""], rows)]
    )


def first_line(program: str, *arguments: str, containing: str = "") -> str:
    """The first such line that a program prints, or why there is none."""
    if shutil.which(program) is None:
        return "not found"
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=30)
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if containing in line and line.strip()]
    return lines[0] if lines else f"exit status {done.returncode}"


if __name__ == "__main__":
    print(report())
