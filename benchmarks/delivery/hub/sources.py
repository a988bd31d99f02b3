"""Which files of the package an op needs, read from their imports, and what those import from elsewhere."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "mmdpo_kernels"
ALLOWED = frozenset({"torch", "triton"})
"""Besides the standard library. The rules name PyTorch alone; that Triton may be imported too is what their own pure Python kernels do."""


class Source:
    """What one file imports, at whatever moment."""

    foreign: set[str]
    """Packages that are neither this one nor of the standard library; of `import_module` too, where it is given a name as it stands."""
    own: set[Path]
    """Files of its own package: what relative imports lead to."""
    missing: list[str]
    """Relative imports that lead to no source file, such as a compiled module."""

    def __init__(self, path: Path) -> None:
        self.path, self.own, self.missing = path, set(), []
        names: list[str] = []
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level:
                for alias in node.names:
                    self._follow(node.level, node.module or "", alias.name)
            elif isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            elif isinstance(node, ast.Call) and _function(node) == "import_module" and isinstance(node.args[0], ast.Constant):
                name = str(node.args[0].value)
                level = len(name) - len(name.lstrip("."))
                if level:
                    self._follow(level, name[level:], "")
                else:
                    names.append(name)
        self.foreign = {name.partition(".")[0] for name in names} - sys.stdlib_module_names

    def _follow(self, level: int, module: str, name: str) -> None:
        """`from <level dots><module> import <name>`, where `name` may be a module or something in one."""
        place = self.path.parents[level - 1].joinpath(*filter(None, module.split(".")))
        candidates = [place.with_suffix(".py"), place / "__init__.py"]
        if name:
            candidates = [place / f"{name}.py", place / name / "__init__.py", *candidates]
        found = next((each for each in candidates if each.is_file()), None)
        if found is None:
            self.missing.append(f"{'.' * level}{module}{'.' if module and name else ''}{name}")
        else:
            self.own.add(found)


def _function(node: ast.Call) -> str | None:
    return getattr(node.func, "attr", getattr(node.func, "id", None))


def closure(paths: Iterable[Path], package: Path = PACKAGE) -> dict[Path, Source]:
    """All files that `paths` bring with them, themselves and the `__init__` of each folder included; not that of the package itself."""
    found: dict[Path, Source] = {}
    waiting = list(paths)
    while waiting:
        path = waiting.pop()
        if path not in found and path != package / "__init__.py":
            found[path] = Source(path)
            folders = [parent for parent in path.parents if parent.is_relative_to(package)]
            waiting += [*found[path].own, *(folder / "__init__.py" for folder in folders)]
    return found


def fits(path: Path, package: Path = PACKAGE) -> bool:
    """Whether a file, and all that it brings with it, imports nothing but source files of its own and what is allowed."""
    return all(source.foreign <= ALLOWED and not source.missing for source in closure([path], package).values())
