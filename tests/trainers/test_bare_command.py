"""`mmdpo` where the extra `train` is not installed, or something of it is too old: one line that says what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.cli import missing

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
from mmdpo_trainers.cli.main import main
for words in {commands!r}:
    try:
        code = main(words)
    except SystemExit as stopped:
        code = stopped.code
    print("exit", code, flush=True)
"""
OF_TRAIN = (
    *("accelerate", "datasets", "jinja2", "peft", "PIL", "pydantic", "yaml", "rapidfuzz", "rich", "safetensors", "sentencepiece"),
    *("tokenizers", "transformers", "xxhash"),
)


def test_without_the_extra_it_says_what_to_install() -> None:
    program = BLOCKED.format(names=OF_TRAIN, commands=[["--help"], ["env"], ["run", "shapes_mdpo"], ["train", "--help"], ["evn"]])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    install = "which is not installed: pip install 'mmdpo-kernels[train]'"
    help_text, environment = done.stdout.split("exit 0")[:2]
    help_text = " ".join(help_text.split())
    assert "torch" in environment and "attention_mass" in environment
    assert "env print versions" in help_text and "Every other command needs" in help_text and install in help_text
    assert "init, run, augment, generate" in help_text
    assert done.stdout.split("exit 0")[2].split() == ["exit", "2"] * 3
    run, train, *_, mistyped = done.stderr.strip().splitlines()
    assert "invalid choice: 'evn' (choose from" in mistyped
    assert run.startswith("mmdpo: error: mmdpo run needs ") and run.endswith(install)
    assert train.startswith("mmdpo: error: mmdpo train needs ") and train.endswith(install)


def test_it_knows_the_names_of_all_commands() -> None:
    (added,) = (action for action in cli.make_parser()._actions if action.choices)
    assert list(added.choices or ()) == [*cli._OF_TRAIN, "env"]


def test_a_package_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(missing, "_version", lambda project: "4.57.1" if project == "transformers" else None)
    line = missing.remedy(ImportError("cannot import name 'x' from 'transformers'"), "mmdpo run")
    assert line == ("mmdpo run needs transformers 5.17 or newer, and 4.57.1 is installed: pip install -U 'mmdpo-kernels[train]'")


def test_an_import_that_no_extra_is_about_is_a_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing.remedy(ModuleNotFoundError("No module named 'no_such'", name="no_such"), "mmdpo run") is None
    assert missing.remedy(ImportError("cannot import name 'x' from 'mmdpo_trainers'"), "mmdpo run") is None

    def broken() -> None:
        raise ModuleNotFoundError("No module named 'mmdpo_trainers.none'", name="mmdpo_trainers.none")

    monkeypatch.setattr(cli, "make_parser", broken)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["env"])
