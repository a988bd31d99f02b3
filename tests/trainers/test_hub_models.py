"""A model by its id on the hub: the local cache first, one commit for all of a run, and what is said where it is not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.config.shipped import SHIPPED
from mmdpo_trainers.errors import StageError
from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.models import hub
from mmdpo_trainers.models.hub import resolve_model_path

ID, FIRST, SECOND = "tiny/prior", "1" * 40, "2" * 40
REMOTE = SHIPPED["shapes_prior"]


def add_snapshot(cache: Path, commit: str, branch: str = "main") -> Path:
    """A commit of the model in a cache, laid out as huggingface_hub does: links to files that are named by their content."""
    repository = cache / "models--tiny--prior"
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(sorted(path for path in REMOTE.iterdir() if path.is_file())):
        blob = repository / "blobs" / f"{commit}{number}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    (repository / "refs" / branch).write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_what_is_in_the_cache_needs_no_network(cache: Path) -> None:
    snapshot = add_snapshot(cache, FIRST)
    assert resolve_model_path(ID) == resolve_model_path(ID, "main") == resolve_model_path(ID, FIRST) == snapshot
    other = add_snapshot(cache, SECOND, "next")
    assert resolve_model_path(ID, "next") == other and hub.commit_of(other) == SECOND
    (Path("tiny") / "prior").mkdir(parents=True)
    assert resolve_model_path(ID) == Path(ID), "a folder of that name comes first"


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (
            lambda cache: None,
            (ID,),
            r"model 'tiny/prior': no such folder here, no revision main in the Hugging Face cache \(.*cache\), and HF_HUB_OFFLINE keeps it "
            r"from being downloaded; unset that, or `hf download tiny/prior` where there is network, or give --model a folder",
        ),
        (lambda cache: add_snapshot(cache, FIRST), (ID, "v2"), r"no revision v2 in .*`hf download tiny/prior --revision v2`"),
        (
            lambda cache: (add_snapshot(cache, FIRST) / "model.safetensors").unlink(),
            (ID,),
            rf"no weights in .*{FIRST}, and HF_HUB_OFFLINE",
        ),
        (lambda cache: None, ("prior",), r"model 'prior': no such folder here \(.*prior\), and no id .* owner/name"),
        (lambda cache: None, ("./tiny/prior",), r"model './tiny/prior': no such folder here"),
        (lambda cache: None, ("shapes", "main"), r"revision: expected none beside a folder, got 'main' with model 'shapes'"),
    ],
)
def test_what_is_not_there_is_said(cache: Path, prepare: Callable[[Path], Any], arguments: Any, message: str) -> None:
    prepare(cache)
    with pytest.raises(StageError, match=message):
        resolve_model_path(*arguments)


def test_no_network_is_said_too(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    def unreachable(*args: Any, **options: Any) -> str:
        raise LocalEntryNotFoundError("no such snapshot") from (None if options.get("local_files_only") else OSError("no route"))

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(StageError, match=r"cannot be downloaded from http://127.0.0.1:9 \(OSError: no route\); `hf download"):
        resolve_model_path(ID)


def test_what_the_cache_lacks_is_downloaded_and_no_program_is(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = tmp_path / "remote"
    shutil.copytree(REMOTE, remote)
    for name in ("modeling_own.py", "consolidated.safetensors", "onnx/config.json", "training_args.bin"):
        (remote / name).parent.mkdir(exist_ok=True)
        (remote / name).write_text("x")
    asked: list[list[str]] = []

    def download(model: str, *, revision: str, allow_patterns: list[str], ignore_patterns: Any = None, **options: Any) -> str:
        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("nothing")
        files = [path.relative_to(remote).as_posix() for path in remote.rglob("*") if path.is_file()]
        asked.append(sorted(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)))
        target = cache / "snapshots" / FIRST
        target.mkdir(parents=True, exist_ok=True)
        for file in asked[-1]:
            shutil.copyfile(remote / file, target / file)
        return str(target)

    monkeypatch.setattr(hub, "snapshot_download", download)
    own = sorted(path.name for path in REMOTE.iterdir() if path.is_file())
    assert resolve_model_path(ID, weights=False).is_dir() and asked.pop() == [name for name in own if name != "model.safetensors"]
    assert resolve_model_path(ID).is_dir() and asked.pop() == own
    (remote / "model.safetensors").unlink()
    shutil.rmtree(cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(StageError, match="no weights in .*, and the hub has none there either, or was not reached"):
        resolve_model_path(ID)


def test_a_run_stays_with_the_commit_that_it_began_with(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_snapshot(cache, FIRST)
    run = tmp_path / "run"
    settings = {
        "model": ID,
        "pairs.pictures": 12,
        "pairs.held_out": 0.5,
        "pairs.questions": "{disagree: 2, agree: 2}",
        "train.args": "{max_steps: 1, per_device_train_batch_size: 2, lora_r: 2}",
        "arms": "{}",
    }
    command = ["run", "shapes_mdpo", "--run-dir", str(run)]
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command += ["--until", "train"]
    assert cli.main(command) == 0
    assert read_json(run / "models.json") == {ID: {"main": FIRST}}
    assert read_json(run / "train/state.json")["parts"]["model"] == f"{ID}@{FIRST}"

    (add_snapshot(cache, SECOND) / "config.json").unlink()  # main is something else now, and could not be used
    capsys.readouterr()
    assert cli.main(command) == 0 and cli.main(["train", "--run", str(run)]) == 0
    assert capsys.readouterr().err.count("train: done before") == 2
    assert read_json(run / "summary.json")["model"] == ID
    assert cli.main(["train", "--run", str(run), "--revision", "v2"]) == 2
    assert "no revision v2 in the Hugging Face cache" in capsys.readouterr().err


def test_check_takes_an_id(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_snapshot(cache, FIRST, "v1")
    assert cli.main(["check", "--model", ID, "--revision", "v1", "--only", "prompts", "--json"]) == 0
    assert FIRST in json.loads(capsys.readouterr().out)["model"]
