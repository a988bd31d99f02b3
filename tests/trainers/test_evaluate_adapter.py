"""`mmdpo evaluate` without a run: an adapter beside its base on one's own prompts, and the model that it was exported as."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_run import write_lines
from tiny_models import sample_pictures

from mmdpo_trainers.answers.transformers_engine import generate_responses
from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.data.records import read_prompts
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.report.intervals import Proportion


@pytest.fixture(scope="module")
def prompts(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions in two groups; the true answers are some of the base's and some of the adapter's own."""
    folder = tmp_path_factory.mktemp("prompts")
    names = []
    for number, picture in enumerate(sample_pictures(4)):
        picture.save(folder / f"{number}.png")
        names.append(f"{number}.png")
    records = [
        {
            "id": f"q{number}",
            "prompt": "<image>\nwhat colour ?" if number % 2 else "<image>\n<image>\nwhich is red ?",
            "images": names[number % 3 : number % 3 + 2 - number % 2],
            "target": 0,
            "num_images": 2 - number % 2,
            "format": "single" if number % 2 else "sequence",
            "answer": "to be filled in",
        }
        for number in range(6)
    ]
    path = folder / "questions.jsonl"
    write_lines(path, records)
    models = [load_model(base, device="cpu"), load_model(base, adapter=adapter, device="cpu")]
    answers = [
        {
            record["id"]: answer["response"]
            for record in read_prompts(path)
            for answer in generate_responses(model, [record], max_new_tokens=4)
        }
        for model in models
    ]
    assert all(answers[0][record["id"]] != answers[1][record["id"]] for record in records)
    for number, record in enumerate(records):
        record["answer"] = answers[number < 4][record["id"]]
    write_lines(path, records)
    return path


def test_an_adapter_beside_its_base(
    base: Path,
    adapter: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Accuracies are those of the answers; again it has nothing to do; the exported model answers as base and adapter do."""
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", "--adapter", str(adapter), "--model", str(base), "--input", str(prompts), "--max-new-tokens", "4"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "0.667" in shown and "+0.333" in shown and "adapter" in shown
    assert cli.main([*command, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("done before") == 2
    found = json.loads(captured.out)
    for name in ("single", "sequence"):
        row = found["accuracy"][name]
        assert row["questions"] == 3
        for label, right in (("base", 1), ("adapter", 2)):
            share = Proportion(right, 3)
            assert row[label] == {"accuracy": share.value, "interval": [share.low, share.high]}
        assert row["change"]["value"] == pytest.approx(1 / 3)
    assert cli.main(["export", str(adapter), "merged", "--base", str(base), "--no-verify"]) == 0
    capsys.readouterr()
    alone = ["evaluate", "--model", "merged", "--input", str(prompts), "--max-new-tokens", "4", "--json"]
    assert cli.main(alone) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["adapter"] is None
    for name, row in whole["accuracy"].items():
        assert row["base"] == found["accuracy"][name]["adapter"] and "change" not in row


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "MODEL"], "--input is missing"),
        (["--adapter", "MODEL", "--input", "x.jsonl"], "--model is missing"),
        (
            ["--adapter", "none", "--model", "MODEL", "--input", "PROMPTS"],
            "--adapter none: expected the folder of a PEFT adapter",
        ),
        (["--model", "MODEL", "--input", "PROMPTS", "--arm", "sft"], "an evaluation without a run has no arms"),
    ],
)
def test_what_is_missing_is_said_before_any_work(
    base: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"MODEL": str(base), "PROMPTS": str(prompts)}
    assert cli.main(["evaluate", *(given.get(each, each) for each in options)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
