"""README and docs/ name what there is: links, files, folders, modules, tests; README's tree is the one that `TokenTree` packs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from mmdpo_kernels import TokenTree

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
TOP = ("benchmarks", "csrc", "docs", "mmdpo_kernels", "tests", "trainers")
FILES = [path.relative_to(ROOT).as_posix() for top in TOP for path in (ROOT / top).rglob("*") if "__pycache__" not in path.parts]
FILES += [path.name for path in ROOT.iterdir()]
WRITTEN = {
    "config.yaml",
    "summary.json",
    "state.json",
    "layers.json",
    "data.json",
    "date.json",
    "template_date.json",
    "generation_config.json",
    "adapter_config.json",
    "quantization.json",
    "mmdpo_run.yaml",
    "reward_model.json",
    "tiles.json",
    # Of published benchmarks.
    *("annotations.json", "relation.json", "query_all.json", "instances_*.json", "captions_*.json", "response_template.json"),
    *("mm-vet.json", "alpaca_eval.json", "alpaca_eval_gpt4_baseline.json"),
}
"""Files of runs, trainings and models, and of others."""

FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.M | re.S)
NAMED = re.compile(r"[\w./<>*-]+\.(?:py|md|yaml|json)\b")
UNDER_TOP = re.compile(rf"(?<![\w./-])(?:{'|'.join(TOP)})/[\w./<>*-]*\w/?")
MODULE = re.compile(r"(?<![\w./-])(?:mmdpo_kernels|mmdpo_trainers|benchmarks)(?:\.\w+)+")
GENERATED = re.compile(r"<!-- (\w+): begin -->.*?<!-- \1: end -->", re.S)


def parts(page: Path) -> tuple[str, list[str], list[tuple[str, str]]]:
    """Prose, what stands in backticks in it, and the blocks of code with their languages."""
    text = page.read_text(encoding="utf-8")
    prose = FENCE.sub("", text)
    return prose, re.findall(r"`([^`\n]+)`", GENERATED.sub("", prose)), FENCE.findall(text)


def is_there(name: str) -> bool:
    """Whether a path ends in these folders and this name; `<op>` and `*` stand for anything."""
    pattern = re.sub(r"<\w+>", "*", name).rstrip("/")
    return any(fnmatch(file, pattern) or fnmatch(file, f"*/{pattern}") for file in FILES)


def headings(page: Path) -> set[str]:
    """A page's anchors, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in found}


def names_in(module: str) -> set[str] | None:
    """What a module of ours defines or imports at its top level; None where there is no such file."""
    path = ROOT.joinpath("trainers" if module.startswith("mmdpo_trainers") else "", *module.split("."))
    if path.is_dir() and not (path / "__init__.py").exists():
        return set()
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.is_file():
        return None
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def is_module(name: str) -> bool:
    """Whether it is a module, or a name in one. What is private may be made by the build."""
    parent, _, last = name.rpartition(".")
    private = any(part.startswith("_") for part in name.split("."))
    return names_in(name) is not None or private or last in (names_in(parent) or ())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", parts(page)[0]):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in headings(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_modules_exist(page: Path) -> None:
    prose, ticked, blocks = parts(page)
    code = [text for _, text in blocks]
    paths = {name for text in ticked for name in NAMED.findall(text) if Path(name).name not in WRITTEN}
    paths |= {name for text in (*ticked, *code) for name in UNDER_TOP.findall(text)}
    assert not {name for name in paths if not is_there(name)}
    assert not {name for text in (prose, *code) for name in MODULE.findall(text) if not is_module(name)} - WRITTEN
    imported = [node for kind, text in blocks if kind == "python" for node in ast.walk(ast.parse(text))]
    for node in imported:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmdpo_"):
            assert {alias.name for alias in node.names} <= (names_in(node.module or "") or set()), ast.unparse(node)


def named_tests(page: Path) -> Iterator[tuple[str, str]]:
    """(test file, test) of every `test_file::test`, where `…::test` is of the file named last."""
    file = ""
    for name, test in re.findall(r"`(test_\w+|…)::(test_\w+)`", page.read_text(encoding="utf-8")):
        file = file if name == "…" else name
        yield file, test


def test_tests_that_are_named_exist() -> None:
    texts: dict[str, str] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        texts[path.stem] = texts.get(path.stem, "") + path.read_text(encoding="utf-8")
    named = {each for page in PAGES for each in named_tests(page)}
    assert named and not {(file, test) for file, test in named if f"def {test}(" not in texts.get(file, "")}


def test_the_tree_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    drawn = {
        name: [int(each) for each in re.findall(r"\d+", text.split(f"\n {name} ")[1].split("\n")[0])]
        for name in ("j", "tree_end[j]")
    }
    prompt, chosen, rejected = [1, 1, 1, 2, 3], [4, 5], [6, 7, 8]
    tree = TokenTree.from_sequences([prompt + chosen, prompt + rejected], prompt_lengths=[5, 5])
    assert drawn["j"] == list(range(tree.num_tokens)) and drawn["tree_end[j]"] == tree.tree_end.tolist()


def test_the_first_screen_of_the_readme() -> None:
    """What it is, for whom, why fast, what is unmeasured, how to start."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:45]
    wanted = ["**What it is.**", "**For whom.**", "**Why it is fast.**", "**What is unmeasured.**", "**How to start.**", "Next:"]
    places = [number for word in wanted for number, line in enumerate(lines) if line.startswith(word)]
    assert len(places) == len(wanted) and places == sorted(places)


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert not [
        page.name for page in PAGES if page.parent == ROOT / "docs" and page.name != "README.md" and f"({page.name})" not in index
    ]


def test_what_is_not_there_is_seen() -> None:
    assert is_there("losses.py") and is_there("backends/reference/<op>.py") and is_there("mmdpo_kernels/losses.py")
    assert not is_there("lossess.py") and not is_there("ops/losses.py") and not is_there("osses.py")
    assert is_module("mmdpo_kernels.patch_model") and is_module("mmdpo_trainers.models.chat_format")
    assert not is_module("mmdpo_trainers.chat_format") and not is_module("mmdpo_kernels.losses.none")
