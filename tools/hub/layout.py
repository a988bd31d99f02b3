"""Writes the repository: `build/<variant>/` with the ops' sources, metadata and digest, and the card.

A variant is a package of its own, which `kernels` imports by the unique `id` in its metadata. In it are the files that the public functions
need, and of every op the backends that import nothing but PyTorch and Triton: what needs numpy, transformers or the compiled module is left out.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import shutil
from pathlib import Path
from types import ModuleType

from mmdpo_kernels.backends.ops_table import OPS
from tools.hub.sources import PACKAGE, closure, fits
from tools.hub.variant import digest, load

NAME = "mmdpo-kernels"
VERSION = 0
"""The repository's branch is v0. By their convention: the API may still change."""
VARIANTS: dict[str, dict[str, object]] = {
    "torch-cpu": {"type": "cpu"},
    # Compiled where it runs, from compute capability 8.0 on: what the suffix says of code that was compiled before.
    "torch-cuda": {"type": "cuda", "archs": ["8.0+PTX"]},
}
OFFERED = (
    "LogProbs",
    "PreferenceLoss",
    "SequenceLogps",
    "SharedRows",
    "TokenLogps",
    "TreeAttentionOutput",
    "attention_mass",
    "backends",
    "image_segments",
    "linear_logprobs",
    "load_balancing_loss",
    "preference_loss",
    "sequence_logps",
    "tree_attention",
)
"""The public names: ops, what they take and return, and what says where they run."""
CARD = Path(__file__).with_name("card.md")

_OLDER = '''"""The same names, for versions of `kernels` that look for the package here."""

import importlib.util
import sys
from pathlib import Path

_NAME = "{id}"
if _NAME not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_NAME, Path(__file__).resolve().parents[1] / "__init__.py")
    sys.modules[_NAME] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_NAME])
__all__ = sys.modules[_NAME].__all__
globals().update({{name: getattr(sys.modules[_NAME], name) for name in __all__}})
'''


def write(repository: Path) -> None:
    """Write the repository, in place of what is there.

    Raises:
        ValueError: a public name needs a file that breaks the rules, or a folder is there that is no such repository.
    """
    if repository.exists() and any(repository.iterdir()) and not (repository / "build").is_dir():
        raise ValueError(f"{repository}: expected a repository that was laid out before, or nothing; name another folder")
    shutil.rmtree(repository, ignore_errors=True)
    files = package_files()
    unique = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:10]
    for variant, backend in VARIANTS.items():
        identifier = f"_{PACKAGE.name}_{backend['type']}_{unique}"
        folder = repository / "build" / variant
        inside = {**files, f"{PACKAGE.name}/__init__.py": _OLDER.format(id=identifier)}
        for name, text in inside.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        metadata = {
            "id": identifier,
            "name": NAME,
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": backend,
            "digest": {"algorithm": "sha256", "files": {name: digest(text.encode()) for name, text in sorted(inside.items())}},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(PACKAGE.parent / "LICENSE", repository / "LICENSE")
    module = load(repository / "build" / "torch-cpu")
    (repository / "README.md").write_text(
        CARD.read_text(encoding="utf-8").replace("{functions}", _functions(module)), encoding="utf-8"
    )


def package_files() -> dict[str, str]:
    """Name within the package -> text, of a variant; its `__init__` offers what `OFFERED` names.

    Raises:
        ValueError: what one of them needs breaks the rules.
    """
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imported: dict[str, list[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (names := [alias.name for alias in node.names if alias.name in OFFERED]):
            imported[node.module or ""] = names
    doors = [_file(PACKAGE.joinpath(*module.split("."))) for module in imported]
    broken = {str(path.relative_to(PACKAGE)) for path in doors if not fits(path)}
    if broken:
        raise ValueError(
            f"{', '.join(sorted(broken))}: expected imports of PyTorch and Triton alone, in all files that these need"
        )
    backends = (PACKAGE / "backends" / backend / f"{op}.py" for op, row in OPS.items() for backend in row.backends)
    files = closure([*doors, *(path for path in backends if fits(path))])
    texts = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in sorted(files)}
    lines = [f'"""{ast.get_docstring(tree, clean=True).splitlines()[0]}"""', ""]  # type: ignore[union-attr]
    lines += [f"from .{module} import {', '.join(names)}" for module, names in imported.items()]
    return {"__init__.py": "\n".join([*lines, "", f"__all__ = {json.dumps(sorted(OFFERED))}", ""]), **texts}


def _file(stem: Path) -> Path:
    return stem.with_suffix(".py") if stem.with_suffix(".py").is_file() else stem / "__init__.py"


def _functions(module: ModuleType) -> str:
    """The card's list of functions, each with the first line of its docstring."""
    functions = [name for name in module.__all__ if inspect.isfunction(getattr(module, name))]
    return "\n".join(f"- `{name}`: {(inspect.getdoc(getattr(module, name)) or '').splitlines()[0]}" for name in functions)
