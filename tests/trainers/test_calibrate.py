"""`mmdpo calibrate` from prompts to settings on the shipped model, killed and continued; and on answers of the user's own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmdpo_trainers.cli.main import main
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.data.image_paths import placed
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.stages import score

CONFIG = "shapes_mia_dpo"
PROMPTS = 240


def calibrate(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["calibrate", *flags]) == 0
    return capsys.readouterr().out


def settings_in(text: str) -> dict[str, Any]:
    """The lines to paste, as a configuration takes them."""
    lines = text.split("For a configuration file:")[1].split("report:")[0]
    values: dict[str, Any] = yaml.safe_load(lines)
    RunConfig.from_dict(values)
    return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calibrated") / "run"


def test_from_prompts_to_settings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", CONFIG, "--run", str(folder), "--num-prompts", str(PROMPTS), "--batch-size", "32"]
    said = calibrate(capsys, *flags)
    curves = json.loads((folder / "score" / "layers.json").read_text())
    assert settings_in(said)["score"] == {"layer": curves["best"]["all"]["layer"]}
    thresholds = settings_in(said)["select"]["thresholds"]
    assert thresholds["pip"][2] == curves["thresholds"]["pip"]["2"]["threshold"]
    assert len(curves["auc"]["all"]) == 4 and sum(curves["answers"]["all"].values()) == PROMPTS
    assert not (folder / "select").exists() and not (folder / "train").exists()
    page = (folder / "report.html").read_text()
    assert "Does attention tell right from wrong?" in page and "Preference pairs" not in page

    # The recordings of a layer are those of a pass that records it alone.
    records = list(read_jsonl(folder / "score" / "scores.jsonl"))
    assert all(len(record["ratios"]) == 4 for record in records)

    # Killed while it scored, and before: what is there is kept, and the end is the same.
    whole = {name: (folder / "score" / name).read_bytes() for name in ("scores.jsonl", "layers.json")}
    generated = (folder / "generate" / "responses.jsonl").read_bytes()
    (folder / "score" / "summary.json").unlink()
    (folder / "score" / "layers.json").unlink()
    lines = whole["scores.jsonl"].splitlines(keepends=True)
    (folder / "score" / "scores.jsonl").write_bytes(b"".join(lines[:90]) + lines[90][:30])
    (folder / "generate" / "summary.json").unlink()
    (folder / "generate" / "responses.jsonl").write_bytes(generated[: len(generated) // 2])
    assert settings_in(calibrate(capsys, *flags)) == settings_in(said)
    assert (folder / "generate" / "responses.jsonl").read_bytes() == generated
    assert {name: (folder / "score" / name).read_bytes() for name in whole} == whole


def test_done_before_it_says_the_same_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = calibrate(capsys, "--run", str(folder))
    assert "AUC of the ratio" in said and "right and" in said and settings_in(said)["score"]


def test_answers_of_the_users_own(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "mine"
    shutil.copytree(folder / "augment", own / "augment")
    (own / "generate").mkdir()
    keys = ("id", "format", "images", "prompt", "answer", "target", "num_images", "box", "region", "patch_grid", "response")
    records = [{key: record[key] for key in keys} for record in read_jsonl(folder / "generate" / "responses.jsonl")][:120]
    for record in records:
        record["images"] = [placed(image, folder / "generate") for image in record["images"]]
    path = own / "mine.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    said = calibrate(capsys, "--model", "shapes", "--responses", str(path), "--run", str(tmp_path / "run"), "--match", "exact")
    layers = json.loads((tmp_path / "run" / "score" / "layers.json").read_text())
    assert sum(layers["answers"]["all"].values()) == 120 and not (tmp_path / "run" / "generate").exists()
    assert settings_in(said)["select"]["match"] == "exact"
    # Measured by a pass of its own, the ratios are those recorded while generating.
    recorded = {record["id"]: record["ratios"] for record in read_jsonl(folder / "score" / "scores.jsonl")}
    for record in read_jsonl(tmp_path / "run" / "score" / "scores.jsonl"):
        assert record["ratios"] == pytest.approx(recorded[record["id"]], abs=1e-4)


def test_prompts_without_answers_are_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompts.jsonl"
    record = {
        "id": "a",
        "format": "single",
        "images": ["a.png"],
        "prompt": "<image>\nWhat is it?",
        "answer": "a cat",
        "target": 0,
    }
    path.write_text(json.dumps({**record, "num_images": 1}) + "\n")
    assert main(["calibrate", "--input", str(path), "--run", str(tmp_path / "run")]) == 2
    assert "none of its 1 record has both several pictures and an `answer`" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["calibrate", "--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for words in ("--responses", "area under the ROC curve", "1,000 prompts", "mmdpo calibrate --model"):
        assert words in text


def test_the_table_marks_what_is_gone_by() -> None:
    curves = {
        "layers": [3, 7], "chosen": {"all": 7, "grid": 3},
        "auc": {"all": [None, {"value": 0.8, "low": 0.7, "high": 0.9}], "grid": [{"value": 0.6, "low": 0.5, "high": 0.7}, None]},
    }  # fmt: skip
    cells = [list(column.cells) for column in score.layers_table(curves).columns]
    assert cells == [["3", "7"], ["-", "0.80 0.70-0.90*"], ["0.60 0.50-0.70*", "-"]]
