"""The rules of kernel repositories, as far as they are about one of pure Python; the first half needs no `kernels` package.

https://huggingface.co/docs/kernels/kernel-requirements
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.hub.sources import ALLOWED, ROOT, Source
from tools.hub.variant import digest

_BLOCKED = """
import importlib.abc, sys
from pathlib import Path
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("numpy", "mmdpo_kernels", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
import warnings
warnings.filterwarnings("ignore")
import torch
from tools.hub.variant import load
before = set(torch._C._dispatch_get_all_op_names())
module = load(Path(sys.argv[1]))
query = torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True)
ends = torch.tensor([[4, 4, 3, 4]], dtype=torch.int32)
module.tree_attention(query, query, query, ends, backend="reference").output.sum().backward()
print(*sorted({name.partition("::")[0] for name in set(torch._C._dispatch_get_all_op_names()) - before}))
"""
"""Without what is not allowed, and without the package itself: runs an op, and prints the namespaces of operators that came."""


def violations(repository: Path) -> list[str]:
    """What in a laid out repository breaks a rule, a line each; nothing is imported."""
    variants = sorted((repository / "build").iterdir())
    found = [f"{name}: missing" for name in ("README.md", "LICENSE") if not (repository / name).is_file()]
    for variant in variants:
        found += [f"{variant.name}: {each}" for each in (*_metadata(variant), *_sources(variant))]
    return found


def _metadata(variant: Path) -> Iterator[str]:
    metadata: dict[str, Any] = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))
    module = metadata["name"].replace("-", "_")
    if not re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", metadata["name"]):
        yield f"name {metadata['name']!r}: expected lower-case letters, digits and dashes"
    if not metadata["id"].isidentifier() or metadata["id"] == module:
        yield f"id {metadata['id']!r}: expected a Python identifier that is this build's alone"
    if variant.name != f"torch-{metadata['backend']['type']}":
        yield f"backend {metadata['backend']['type']!r}: expected the folder's"
    if metadata["backend"]["type"] == "cuda" and not metadata["backend"].get("archs"):
        yield "backend: expected archs, which it must name for CUDA"
    there = {
        path.relative_to(variant).as_posix(): digest(path.read_bytes())
        for path in variant.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and path != variant / "metadata.json"
    }
    if metadata["digest"]["files"] != there:
        yield "digest: expected that of the files as they are"
    for name in ("__init__.py", f"{module}/__init__.py"):
        if name not in there:
            yield f"{name}: missing"


def _sources(variant: Path) -> Iterator[str]:
    for path in sorted(variant.rglob("*.py")):
        source, name = Source(path), path.relative_to(variant)
        if source.foreign - ALLOWED:
            yield f"{name}: imports {', '.join(sorted(source.foreign - ALLOWED))}; expected the standard library, PyTorch and Triton alone"
        if outside := [each for each in source.own if not each.is_relative_to(variant)]:
            yield f"{name}: imports {outside[0]}, which is outside of the variant"
        if source.missing:
            yield f"{name}: imports {', '.join(source.missing)}, which the variant does not have"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_registration = isinstance(node, ast.Call) and getattr(node.func, "attr", None) in (
                "custom_op",
                "triton_op",
                "Library",
            )
            if is_registration and getattr(getattr(node.args[0], "func", None), "id", None) != "add_op_namespace_prefix":  # type: ignore[attr-defined]
                yield f"{name}:{node.lineno}: expected add_op_namespace_prefix(...) as an operator's name"  # type: ignore[attr-defined]


def namespaces(variant: Path) -> list[str]:
    """Of the operators that a variant registers: loaded and called where neither numpy, transformers nor this package can be imported.

    Raises:
        RuntimeError: it cannot.
    """
    done = subprocess.run([sys.executable, "-c", _BLOCKED, str(variant)], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{variant}: cannot be imported by itself: {done.stderr.strip()}")
    return done.stdout.split()


def check_with_kernels(repository: Path) -> list[str]:
    """The same by `kernels` itself: its variant's name, metadata and digest by its parsers, and what it would load on this machine.

    Returns:
        What it says of each variant.

    Raises:
        ValueError, RuntimeError: what it does not take.
    """
    from kernels._rust import Digest, DigestAlgorithm, Metadata
    from kernels.validate import default_metadata_validators
    from kernels.variants import VariantAccepted, get_variants_local, resolve_variants

    found = get_variants_local(repository / "build")
    if {variant.variant_str for variant in found} != {path.name for path in (repository / "build").iterdir()}:
        raise ValueError(f"{repository}: expected names of variants that `kernels` knows")
    for variant in found:
        folder = repository / "build" / variant.variant_str
        metadata = Metadata.read_from_file(folder / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
        for validator in default_metadata_validators():
            validator.validate_metadata(metadata=metadata, variant=variant.variant_str)
    _, trace = resolve_variants(found)
    said = [f"{each.variant.variant_str}: {'taken here' if isinstance(each, VariantAccepted) else each.reason}" for each in trace]
    if not any(isinstance(each, VariantAccepted) for each in trace):
        raise ValueError(f"{repository}: no variant is for this machine: {'; '.join(said)}")
    return said
