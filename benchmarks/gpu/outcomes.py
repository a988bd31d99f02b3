"""How the phases of `make gpu` went, kept in one file, so that a command begun again goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu import peers
from benchmarks.gpu.environment import first_line

FILE = "phases.json"
_CODE = ("mmdpo_kernels", "trainers", "csrc", "benchmarks", "tests")
_KINDS = (".py", ".cpp", ".h", ".cu", ".cuh")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a phase went."""

    name: str
    state: str
    """One of "passed", "failed", "out of time" and "left out"."""
    note: str
    seconds: float
    output: str


def fingerprint(root: Path) -> str:
    """Of the GPU, the code and the peers beside it: what has passed on another GPU or with other code says nothing about this."""
    found = hashlib.sha256(first_line("nvidia-smi", "--query-gpu=name,uuid", "--format=csv,noheader").encode())
    found.update(" ".join(peers.versions()).encode())
    for folder in _CODE:
        for path in sorted(path for path in (root / folder).rglob("*") if path.suffix in _KINDS):
            found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def earlier(folder: Path, of: str) -> dict[str, Outcome]:
    """What commands with the same folder, GPU and code have done, by phase."""
    path = folder / FILE
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"of": None}
    if content["of"] != of:
        return {}
    return {each["name"]: Outcome(**each) for each in content["phases"]}


def keep(folder: Path, of: str, known: Mapping[str, Outcome]) -> None:
    """For `earlier`."""
    new = folder / f"{FILE}.new"
    new.write_text(json.dumps({"of": of, "phases": [asdict(each) for each in known.values()]}, indent=1) + "\n", encoding="utf-8")
    new.replace(folder / FILE)
