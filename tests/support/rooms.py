"""The rooms of a package, read from its imports: `python tests/support/rooms.py` prints them with their arrows and circles.

A room is a first-level folder or file of a package. An arrow runs from a room to one that it imports, at whatever moment it does.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"mmdpo_kernels": ROOT / "mmdpo_kernels", "mmdpo_trainers": ROOT / "trainers" / "mmdpo_trainers"}

ORDER = {
    "mmdpo_kernels": (
        *("record", "patch", "recurrent", "recorder_ops", "patched", "path_maps", "recorder", "ops", "backends"),
        *("losses", "loss_terms", "load_balancing", "decoder_layers", "op_names", "tree_mask", "tree", "segments", "head"),
    ),
    "mmdpo_trainers": (
        *("cli", "run", "checks", "stages", "suites", "report", "training", "answers", "shapes", "models"),
        *("methods", "data", "processes", "files", "config", "errors"),
    ),
}
"""Rooms from top to bottom: each may import those after it."""
DOORS = ("__init__", "__main__")
"""Files that only say what a package offers, and may import anything of it."""


def name_of(path: Path, package: str) -> str:
    """Dotted name of a file of a package."""
    parts = path.relative_to(PACKAGES[package]).with_suffix("").parts
    return ".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))


def imports(path: Path, package: str) -> Iterator[str]:
    """Dotted names of the modules that a file of the package imports from the package, in functions too."""
    here = name_of(path, package).split(".")
    if path.name != "__init__.py":
        here = here[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join((*base, *([node.module] if node.module else [])))
            found = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (module for name in found if (module := _module(name, package)) is not None)


def _module(name: str, package: str) -> str | None:
    """The file of the package that a dotted name leads to."""
    parts = name.split(".")
    if parts[0] != package:
        return None
    while len(parts) > 1:
        path = PACKAGES[package].joinpath(*parts[1:])
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            break
        parts.pop()
    return ".".join(parts)


def room_of(module: str) -> str:
    """The room that a module lies in; `__init__` for the package itself."""
    return module.split(".")[1] if "." in module else "__init__"


def arrows(package: str) -> dict[tuple[str, str], list[str]]:
    """(room, room that it imports) -> the imports behind it, as `file -> module`."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(PACKAGES[package].rglob("*.py")):
        source = name_of(path, package)
        for module in sorted(set(imports(path, package))):
            pair = room_of(source), room_of(module)
            if pair[0] != pair[1] and pair[0] not in DOORS and pair[1] not in DOORS:
                found.setdefault(pair, []).append(f"{source} -> {module}")
    return found


def rooms(package: str) -> list[str]:
    """First-level folders and files with code, but for the doors."""
    folder = PACKAGES[package]
    found = [path.stem for path in folder.glob("*.py")] + [path.parent.name for path in folder.glob("*/__init__.py")]
    return sorted(set(found) - set(DOORS))


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (strongly connected components of more than one node, Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for each in sorted(edges.get(node, ())):
            if each not in index:
                visit(each)
                low[node] = min(low[node], low[each])
            elif each in stack:
                low[node] = min(low[node], index[each])
        if low[node] == index[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def room_circles(package: str) -> list[list[str]]:
    """Rooms that import each other, however long the way round is."""
    edges: dict[str, set[str]] = {}
    for source, target in arrows(package):
        edges.setdefault(source, set()).add(target)
    return circles(edges)


def file_circles(package: str) -> list[list[str]]:
    """The same of files."""
    edges: dict[str, set[str]] = {}
    for path in PACKAGES[package].rglob("*.py"):
        if path.stem not in DOORS:
            source = name_of(path, package)
            edges.setdefault(source, set()).update(set(imports(path, package)) - {source})
    return circles(edges)


def upward(package: str) -> dict[tuple[str, str], list[str]]:
    """Arrows against `ORDER`, with the imports behind them."""
    order = ORDER[package]
    return {pair: why for pair, why in arrows(package).items() if order.index(pair[0]) > order.index(pair[1])}


def main() -> None:
    """Print rooms from top to bottom with what each imports, and what is against the order."""
    for package in sys.argv[1:] or PACKAGES:
        found = arrows(package)
        names = sorted(rooms(package), key=lambda room: ORDER[package].index(room) if room in ORDER[package] else -1)
        print(f"{package}: {len(names)} rooms, {len(found)} arrows")
        for room in names:
            print(f"  {room:<14}{' '.join(target for target in names if (room, target) in found)}")
        print(f"  circles of rooms: {room_circles(package) or 'none'}; of files: {file_circles(package) or 'none'}")
        if set(names) == set(ORDER[package]):
            for pair, why in upward(package).items():
                print(f"  upward: {pair[0]} -> {pair[1]}: {'; '.join(why)}")


if __name__ == "__main__":
    main()
