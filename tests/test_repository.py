"""What a public repository has: files that parse, a workflow whose targets exist, a citation of the papers, and code that keeps SECURITY.md."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from docs_code.shell import make_targets

import mmdpo_kernels
from mmdpo_trainers.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
YAML = [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / "CITATION.cff"]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
MODULES = [path for top in ("mmdpo_kernels", "trainers/mmdpo_trainers") for path in sorted((ROOT / top).rglob("*.py"))]

STARTS_PROCESSES = {"mmdpo_kernels/backends/triton/ahead_of_time.py"}
"""It asks the CUDA toolkit's tools about kernels that were compiled."""
OWN_OBJECTS = {"trainers/mmdpo_trainers/files/spool.py"}
"""What it reads it wrote itself, into a file without a name."""
NEVER_IMPORTED = {"cloudpickle", "dill", "marshal", "pickle", "shelve", "subprocess"}
NEVER_CALLED = {"eval", "exec", "os.system", "os.popen", "torch.load", "yaml.full_load", "yaml.unsafe_load"}
ASKED = ("Loader", "trust_remote_code")


def content(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_they_are_mappings_of_yaml(path: Path) -> None:
    assert isinstance(content(path), dict)


def test_the_workflow_makes_what_there_is() -> None:
    path = ROOT / ".github" / "workflows" / "ci.yml"
    assert path.read_text().startswith("# Not run here")
    jobs = content(path)["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = [re.fullmatch(r"make ([\w-]+)", command) for command in commands]
    assert commands and all(targets), commands
    made = {target[1] for target in targets if target}
    assert made <= make_targets() and {"lint", "test"} <= made and any(target.startswith("wheel") for target in made)
    assert not [job for job in jobs.values() if "timeout-minutes" not in job or "runs-on" not in job]


def test_the_changes_and_the_citation_are_of_this_version() -> None:
    assert VERSION == mmdpo_kernels.__version__ == content(ROOT / "CITATION.cff")["version"]
    assert re.search(r"^## (\S+), ", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == VERSION  # type: ignore[index]


def test_the_citation_has_what_the_format_asks_for_and_the_papers() -> None:
    found = content(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "license", "type"} <= set(found)
    named = {each["identifiers"][0]["value"].removeprefix("arXiv:"): each for each in found["references"]}
    assert set(named) == {"2410.17637", "2406.11839"}
    for number, reference in named.items():
        method = reference["title"].partition(":")[0]
        assert f"arXiv {number} | {method} |" in (ROOT / "docs" / "methods.md").read_text()
        assert method in {each.title for each in METHODS.values()} and all(each["family-names"] for each in reference["authors"])


@pytest.mark.parametrize("name", ["bug", "request"])
def test_issue_forms_ask_for_the_environment(name: str) -> None:
    form = content(ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml")
    assert {"name", "description", "body"} <= set(form)
    (asked,) = (each for each in form["body"] if each["attributes"]["label"] == "mmdpo env")
    assert asked["validations"]["required"] is True


def dotted(node: ast.expr) -> str:
    """`a.b` of what is called; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def unsafe(text: str) -> list[str]:
    """What in a module's text reads objects that run code, runs text, starts processes, or might take a model's own code."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.partition(".")[0] in NEVER_IMPORTED]
        elif isinstance(node, ast.Call):
            found += _unsafe_call(
                dotted(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords if each.arg in ASKED}
            )
    return found


def _unsafe_call(name: str, keywords: dict[str | None, str]) -> list[str]:
    if name in NEVER_CALLED or (name == "yaml.load" and keywords.get("Loader") != "_Loader"):
        return [name]
    if keywords.get("trust_remote_code", "False") != "False":
        return ["trust_remote_code"]
    # On a terminal transformers would ask whether to run a folder's code where nothing is said.
    return [name] if re.fullmatch(r"Auto\w+\.from_pretrained", name) and "trust_remote_code" not in keywords else []


def test_nothing_that_is_loaded_is_run() -> None:
    found = {path.relative_to(ROOT).as_posix(): unsafe(path.read_text(encoding="utf-8")) for path in MODULES}
    allowed = {name: ["subprocess"] for name in STARTS_PROCESSES} | {name: ["pickle"] for name in OWN_OBJECTS}
    assert {name: each for name, each in found.items() if each} == allowed
    assert "yaml.SafeLoader" in (ROOT / "trainers/mmdpo_trainers/config/values.py").read_text()


def test_what_is_unsafe_is_seen() -> None:
    assert unsafe("import pickle\neval('1')\ntorch.load(f)\nyaml.load(t, Loader=L)") == [
        "pickle",
        "eval",
        "torch.load",
        "yaml.load",
    ]
    assert unsafe("AutoConfig.from_pretrained(f)\nf(trust_remote_code=True)") == [
        "AutoConfig.from_pretrained",
        "trust_remote_code",
    ]
    assert not unsafe("AutoConfig.from_pretrained(f, trust_remote_code=False)\nmodel.eval()")
