"""The import arrows of docs/architecture.md, read from the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted((ROOT / "mmdpo_kernels").rglob("*.py"))
CORE = {"mmdpo_kernels", "torch", "triton", "numpy"}
# Patching and recording work on transformers models; they import it where they need it.
LAZY = {"patch.py": {"transformers"}, "record.py": {"transformers"}}


def imports(path: Path, tree: ast.AST) -> Iterator[str]:
    """Absolute dotted names that `tree`, part of the file `path`, imports."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def at_import_time(tree: ast.Module) -> ast.Module:
    """The tree without function bodies and without blocks for type checkers."""

    class Prune(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.dump(node.test) else self.generic_visit(node)

    return Prune().visit(tree)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def third_party(names: Iterator[str]) -> set[str]:
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)


def test_there_is_something_to_read() -> None:
    assert len(KERNELS) > 10
    relative = ROOT / "mmdpo_kernels" / "backends" / "native" / "attention_mass.py"
    assert "mmdpo_kernels.tree_mask" in set(imports(relative, parse(relative)))


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_need_torch_triton_and_numpy_only(path: Path) -> None:
    now, ever = third_party(imports(path, at_import_time(parse(path)))), third_party(imports(path, parse(path)))
    assert now <= CORE, f"imported with the package: {sorted(now - CORE)}"
    allowed = CORE | LAZY.get(path.name, set())
    assert ever <= allowed, f"imported at some time: {sorted(ever - allowed)}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_one_way(path: Path) -> None:
    names = set(imports(path, parse(path)))
    assert not {n for n in names if n.partition(".")[0] in ("mmdpo_trainers", "trainers")}
    if "backends" in path.relative_to(ROOT).parts:
        assert not {n for n in names if n.startswith("mmdpo_kernels.ops")}, "backends never import ops"


def test_importing_the_kernels_loads_no_model_library() -> None:
    program = "import sys, mmdpo_kernels; print(*sorted({n.partition('.')[0] for n in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "torch" in loaded
    assert not loaded & {"mmdpo_trainers", "transformers", "peft", "datasets", "accelerate", "PIL", "matplotlib"}
