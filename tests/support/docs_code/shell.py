"""Lines of shell blocks: each program has somebody who reads its arguments as the program would, or is one that cannot be asked here."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path

from docs_code.blocks import ROOT, Block

CANNOT_BE_ASKED = frozenset({"apptainer", "docker", "lmms-eval", "sbatch", "scontrol", "srun", "vllm"})
"""Programs that are not here; a block with one of them is marked as not run."""

_TARGET = re.compile(r"^([\w-]+):(?!=)", re.M)
_SUBSTITUTION = re.compile(r"^[A-Za-z_]\w*=\$\(.*\)$")
_ASSIGNMENT = re.compile(r"^[A-Za-z_]\w*=")


class Unknown(AssertionError):
    """A line that nobody here knows how to read."""


def commands_in(block: Block) -> list[list[str]]:
    """The words of each command, comments left out, lines that go on put together, what is set in front of a command taken off."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
        words = [] if _SUBSTITUTION.match(line) else shlex.split(line, comments=True)
        while words and _ASSIGNMENT.match(words[0]):
            words = words[1:]
        if words:
            found.append(words)
    return found


def programs_in(block: Block) -> set[str]:
    """Names of the programs that a block starts, those in `$(…)` and behind `srun` too."""
    return {words[0] for words in commands_in(block)} | set(re.findall(r"\$\((\w+)", block.text))


def read(words: list[str], mmdpo: Callable[[list[str]], None]) -> None:
    """Raise AssertionError where a command names what there is not. mmdpo: takes the arguments of the `mmdpo` command."""
    program, arguments = words[0], words[1:]
    if program == "mmdpo":
        mmdpo(arguments)
    elif program in ("python", "python3", "torchrun", "accelerate"):
        _started(program, arguments, mmdpo)
    elif program == "make":
        _make(arguments)
    elif program == "pip":
        _pip(arguments)
    elif program == "pytest":
        assert (ROOT / arguments[0].partition("::")[0]).exists(), arguments[0]
    elif program == "sbatch":
        assert Path(arguments[0]).is_file(), arguments[0]
    elif program == "srun":
        read(arguments, mmdpo)
    elif program not in CANNOT_BE_ASKED and program not in ("cd", "printf"):
        raise Unknown(f"nobody knows {program}: {shlex.join(words)}")


def make_targets() -> set[str]:
    """Targets of the Makefile."""
    return set(_TARGET.findall((ROOT / "Makefile").read_text(encoding="utf-8")))


def _make(arguments: list[str]) -> None:
    targets = [word for word in arguments if not _ASSIGNMENT.match(word)]
    assert targets and set(targets) <= make_targets(), targets


def _pip(arguments: list[str]) -> None:
    assert arguments[0] == "install", arguments
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    for word in arguments[1:]:
        ours = re.fullmatch(rf"(?:\.|{project['name']}|\S+\.whl)(?:\[([\w,]+)\])?", word)
        if ours and ours[1]:
            assert set(ours[1].split(",")) <= set(project["optional-dependencies"]), word


def _started(program: str, arguments: list[str], mmdpo: Callable[[list[str]], None]) -> None:
    """A module of ours by Python or by a launcher, whose own arguments its own parser reads."""
    at = arguments.index("-m") if "-m" in arguments else -1
    assert at >= 0, f"{program} is to start a module: {arguments}"
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args([*_numbers(arguments[:at]), "script.py"])
    if program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert arguments[0] == "launch"
        given = launch_command_parser().parse_args([*_numbers(arguments[1:at]), "script.py"])
        assert given.config_file is None or Path(given.config_file).is_file(), given.config_file
    module, rest = arguments[at + 1], arguments[at + 2 :]
    rest = rest[1:] if rest[:1] == ["--"] else rest
    if module == "mmdpo_trainers":
        mmdpo(rest)
    else:
        _module(module, rest)


def _numbers(arguments: list[str]) -> list[str]:
    """Arguments with numbers in the places of what the shell would put there."""
    return [re.sub(r"\$\{?\w+\}?", "1", word) for word in arguments]


def _module(module: str, arguments: list[str]) -> None:
    """A module of ours whose text has the flags that it is given."""
    if module in ("pip", "build"):
        return
    top = "trainers" if module.startswith("mmdpo_trainers") else ""
    path = ROOT.joinpath(top, *module.split("."))
    files = [path / "__main__.py", path / "__init__.py"] if path.is_dir() else [path.with_suffix(".py")]
    texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    assert texts, module
    flags = {word for word in arguments if word.startswith("--")}
    strings = {
        node.value for text in _with_imports(texts) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)
    }
    assert flags <= strings, f"{module} has no {', '.join(sorted(flags - strings))}"


def _with_imports(texts: list[str]) -> list[str]:
    """Texts of modules, and of those of ours that they import from: there a flag may be declared as well."""
    imported = {
        node.module
        for text in texts
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(("benchmarks", "mmdpo"))
    }
    files = []
    for name in imported:
        path = ROOT.joinpath("trainers" if name.startswith("mmdpo_trainers") else "", *name.split("."))
        files += [file for file in (path.with_suffix(".py"), path / "__init__.py", *path.glob("*.py")) if file.is_file()]
    return [*texts, *(Path(file).read_text(encoding="utf-8") for file in files)]
