"""Mistakes of the first hour: each ends in one line that names what was given, what was expected and what to do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmdpo_trainers.cli import main as cli

SMALL = ["--set", "pairs.pictures=12", "--set", "pairs.questions={disagree: 2, agree: 2}", "--set", "arms={}"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """The one line that a command which fails says."""
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as stopped:
        code = stopped.code  # type: ignore[assignment]
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(": starting") and " layout: " not in line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("mmdpo: error: "), lines
    return lines[0].removeprefix("mmdpo: error: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "augment.formats={sequence:8}"], "a space is missing behind the colon of sequence:8: write sequence: 8"),
        (["--set", "augment.num_images={grid: {4:1}}"], "a space is missing behind the colon of 4:1: write 4: 1"),
        (["beta=0.2"], "beta=0.2: a setting is given as --set train.args.beta=0.2"),
        (["--learning-rate", "1e-4"], "--learning-rate: a setting is given as --set train.args.learning_rate=1e-4"),
        (["--set", "beta=0.2"], "unknown key 'beta'; did you mean 'train.args.beta'?"),
        (["--set", "train.beta=0.2"], "unknown key 'train.beta'; did you mean 'train.args.beta'?"),
        (["--set", "layer=3"], "unknown key 'layer'; did you mean 'score.layer'?"),
        (["--set", "gradient_acumulation_steps=3"], "did you mean 'train.args.gradient_accumulation_steps'"),
        (["--set", "train.args.beta", "0.2"], "expected KEY=VALUE in one word, such as --set train.args.beta=0.2"),
        (["--until", "scor"], "did you mean score?; see `mmdpo run --help`"),
        (["--nothing-like-it"], "--nothing-like-it: no such argument; see `mmdpo --help`"),
    ],
)
def test_settings_that_are_given_otherwise(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in said(capsys, "run", "shapes_mia_dpo", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--run", "r", "beta=0.2"], "beta=0.2: that setting is given as --args '{beta: 0.2}'"),
        (["evaluate", "--run", "r", "--batchsize", "3"], "--batchsize: that setting is given as --batch-size 3"),
        (["train", "--run", "r", "layer=3"], "layer=3: no setting of train; score.layer is one of `mmdpo score`"),
        (["train"], "the following arguments are required: --run; see `mmdpo train --help`"),
        (["scor", "--run", "r"], "did you mean score?"),
    ],
)
def test_flags_of_a_stage(words: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in said(capsys, *words)
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("augment:\n  formats: {sequence:8}\n", "line 2, column 13: not valid YAML: a space is missing behind the colon"),
        ("seed:3\nmodel: shapes\n", "mapping values are not allowed here; is a space missing behind a colon in the line before"),
        ("augment:\n\tformats: {}\n", "lines are indented with spaces, not tabs"),
        ("train: {learning_rate: 1e-4}\n", "unknown key 'train.learning_rate'; did you mean 'train.args.learning_rate'?"),
    ],
)
def test_files_that_are_nearly_right(text: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(text)
    line = said(capsys, "run", "mine.yaml")
    assert line.startswith("mine.yaml") and message in line


def test_colons_that_are_no_mapping_stay(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a value, a quoted key and a key with its own value."""
    Path("mine.yaml").write_text("rate: {endpoint: {url: 'http://a:1/v1', model: a:b, parameters: {'x:y': null, z:w: 1}}}\n")
    assert "no stage 'none'" in said(capsys, "run", "mine.yaml", "--restart", "none")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "What?", "answer": "red"}, "all pictures are held out; lower data.holdout"),
        ({"instruction": "What?", "output": "red"}, "all pictures are held out; lower data.holdout"),
        ({"foo": "What?"}, "such as `prompt` with `completion`, or `conversations`; its columns are image, foo"),
    ],
)
def test_columns_of_other_data(record: dict[str, Any], message: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of published layouts are read: what is said then is of one picture only."""
    Image.new("RGB", (9, 9)).save("a.png")
    Path("vqa.jsonl").write_text(json.dumps({"image": "a.png", **record}))
    assert message in said(capsys, "augment", "--run", "run", "--data", "vqa.jsonl")


def test_columns_of_other_preference_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (9, 9)).save("a.png")
    Path("pairs.jsonl").write_text(json.dumps({"image": "a.png", "prompt": "What?", "winner": "red", "loser": "blue"}))
    words = ("pairs", "--run", "run", "--source", "pairs.jsonl", "--model", "shapes_prior")
    assert "no column 'chosen'" in (line := said(capsys, *words)) and "rename winner to chosen and loser to rejected" in line
    Path("pairs.jsonl").write_text(json.dumps({"image": "a.png", "question": "What?", "answer": "red"}))
    assert "of answers alone `mmdpo init mia_dpo` makes pairs" in said(capsys, *words)
    Path("pairs.jsonl").write_text(json.dumps({"image": "a.png", "prompt": "What?", "chosen": "red", "rejected": "blue"}))
    assert "records that share a picture stay on one side" in said(capsys, *words)


def test_a_run_that_stops_early_says_how_it_goes_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "shapes_mdpo", "--run-dir", "run", *SMALL, "--until", "pairs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "done up to pairs: there is nothing to compare yet; the same command without --until does train, evaluate, report",
        f"run folder: {here / 'run'}",
    ]


def test_paths_beside_a_configuration_elsewhere(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("there").mkdir()
    Path("there/pairs.jsonl").write_text("{}")
    Path("there/mine.yaml").write_text("{method: mdpo, model: shapes_prior, pairs: {source: pairs.jsonl}}")
    line = said(capsys, "run", "there/mine.yaml")
    assert f"pairs.source: pairs.jsonl does not exist in {here}, from where relative paths count" in line
    assert f"write {here / 'there/pairs.jsonl'}, or start mmdpo in {here / 'there'}" in line


def test_without_words_it_helps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2 and "mmdpo init --list" in capsys.readouterr().out


def test_control_c_is_no_traceback(here: Path) -> None:
    # What a shell starts in the background ignores the signal, and so does what that starts.
    heeding = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    heeding += "runpy.run_module('mmdpo_trainers', None, '__main__')"
    command = [sys.executable, "-c", heeding, "run", "shapes_mia_dpo", "--run-dir", "run"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    until = time.monotonic() + 120
    while not (here / "run/augment/state.json").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and error.splitlines()[-1] == "mmdpo: interrupted; the same command continues the run"
    assert "Traceback" not in error
