"""The rooms of both packages in their order, read from the syntax trees: no upward import, no circle; and what is loaded when."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import rooms
from rooms import ORDER, PACKAGES, ROOT, arrows, file_circles, imports, name_of, room_circles, upward

from mmdpo_trainers.config.stages import STAGES

KERNELS = sorted(PACKAGES["mmdpo_kernels"].rglob("*.py"))
FOLDERS = sorted(PACKAGES["mmdpo_trainers"].glob("*/__init__.py"))
CORE = {"mmdpo_kernels", "torch", "triton", "numpy"}
# Patching and recording work on transformers models; they import it where they need it.
LAZY = {"patch.py": {"transformers"}, "record.py": {"transformers"}}
MOST_ROOMS, MOST_ARROWS, LONGEST = 18, 80, 80


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_are_in_order(package: str) -> None:
    """Each imports those after it alone. A new room is given its place in `rooms.ORDER`."""
    assert sorted(ORDER[package]) == rooms.rooms(package)
    assert not upward(package) and not room_circles(package) and not file_circles(package)


def test_the_house_stays_small() -> None:
    assert len(rooms.rooms("mmdpo_trainers")) <= MOST_ROOMS and len(arrows("mmdpo_trainers")) <= MOST_ARROWS


def test_no_stage_imports_a_stage() -> None:
    folder = PACKAGES["mmdpo_trainers"] / "stages"
    stages = {name_of(path, "mmdpo_trainers") for path in folder.glob("*.py") if "def inputs(context" in path.read_text()}
    assert len(stages) == len(STAGES)
    for path in folder.glob("*.py"):
        assert not stages & set(imports(path, "mmdpo_trainers")) - {name_of(path, "mmdpo_trainers")}, path.name


@pytest.mark.parametrize("path", FOLDERS, ids=lambda path: path.parent.name)
def test_a_room_says_what_lives_there_and_who_may_import_it(path: Path) -> None:
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert "import" in said.lower(), f"{path}: expected what lives there, and who may import it"


def test_the_reading_of_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A circle, an arrow upwards, imports in functions and relative ones are found."""
    files = {
        "low/__init__.py": "",
        "low/a.py": "def f():\n    from made_up.high import b\n",
        "high/__init__.py": "",
        "high/b.py": "from ..low.a import f\nfrom . import c\nimport made_up.alone",
        "high/c.py": "",
        "alone.py": "from made_up.low.a import f",
        "__init__.py": "from made_up.high.b import f",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setitem(PACKAGES, "made_up", tmp_path)
    monkeypatch.setitem(ORDER, "made_up", ("high", "alone", "low"))
    assert rooms.rooms("made_up") == ["alone", "high", "low"]
    assert set(arrows("made_up")) == {("low", "high"), ("high", "low"), ("high", "alone"), ("alone", "low")}
    assert upward("made_up") == {("low", "high"): ["made_up.low.a -> made_up.high.b"]}
    assert room_circles("made_up") == [["alone", "high", "low"]]
    assert file_circles("made_up") == [["made_up.alone", "made_up.high.b", "made_up.low.a"]]
    assert rooms.circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_no_function_is_long() -> None:
    """But kernels, which are one piece each."""
    long = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in (*KERNELS, *PACKAGES["mmdpo_trainers"].rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and not path.stem.endswith("_kernels") and _lines(node) > LONGEST
    ]
    assert not long


def names_of_families() -> set[str]:
    """Every `model_type` that transformers knows, and the classes of families that are declared."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from mmdpo_trainers.models.families import FAMILIES, REFUSED

    classes = {name for family in FAMILIES.values() for name in (family.model_name, family.processor_name)}
    return {*CONFIG_MAPPING_NAMES, *FAMILIES, *REFUSED, *classes}


def named_families(text: str, names: set[str]) -> list[str]:
    """Families that a source names in its strings: one that is such a name, or a module of transformers for one. Docstrings may."""
    tree, found = ast.parse(text), []
    said = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            parts = node.value.removeprefix("transformers.models.").split(".")
            if node.value in names or (parts[0] in names and node.value.startswith("transformers.models.")):
                found.append(f"{node.lineno}: {node.value}")
    return found


def test_nothing_but_the_families_names_a_model_type() -> None:
    names = names_of_families()
    found = [
        f"{path.relative_to(ROOT)}:{each}"
        for package in PACKAGES.values()
        for path in sorted(package.rglob("*.py"))
        if path.parent.name != "families"
        for each in named_families(path.read_text(encoding="utf-8"), names)
    ]
    assert not found


def test_the_reading_of_names() -> None:
    names = {"llava", "pixtral", "PixtralProcessor"}
    text = """def f(kind):
        \"\"\"llava\"\"\"
        return kind == "llava" or kind in ("PixtralProcessor", "a llava", "transformers.models.pixtral.processing")
    """
    assert named_families(text, names) == ["3: llava", "3: PixtralProcessor", "3: transformers.models.pixtral.processing"]


def _lines(node: ast.FunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def third_party(tree: ast.AST) -> set[str]:
    """Packages outside of this one and the standard library that are imported in `tree`."""

    def names() -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield node.module or ""

    return {name.partition(".")[0] for name in names()} - set(sys.stdlib_module_names)


def at_import_time(tree: ast.Module) -> ast.Module:
    """The tree without function bodies and without blocks for type checkers."""

    class Prune(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.dump(node.test) else self.generic_visit(node)

    return Prune().visit(tree)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_need_torch_triton_and_numpy_only(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    now, ever = third_party(at_import_time(ast.parse(text))), third_party(ast.parse(text))
    assert now <= CORE, f"imported with the package: {sorted(now - CORE)}"
    allowed = CORE | LAZY.get(path.name, set())
    assert ever <= allowed, f"imported at some time: {sorted(ever - allowed)}"


def test_importing_the_kernels_loads_themselves_alone() -> None:
    """Nothing that `import torch` does not bring: no model library, no Triton, and not PyTorch's tracer, which takes seconds."""
    program = (
        "import sys, numpy, torch; before = set(sys.modules); import mmdpo_kernels; print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "mmdpo_kernels.ops.tree_attention" in loaded
    others = {name for name in loaded if name.partition(".")[0] not in {"mmdpo_kernels", *sys.stdlib_module_names}}
    assert not others


def test_the_command_line_loads_no_model_library() -> None:
    """A mistake on the command line is answered at once."""
    program = "import sys; from mmdpo_trainers.cli.main import make_parser; make_parser()"
    program += "; print(*sorted({n.partition('.')[0] for n in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "mmdpo_trainers" in loaded and not loaded & {"torch", "triton", "transformers", "peft", "datasets", "accelerate"}
