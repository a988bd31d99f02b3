"""`mmdpo run` with the shipped settings of Qwen2.5-VL, pictures of different shapes, from single-image data to the page."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from tiny_models import TINY, make_tiny_qwen, sample_pictures

from mmdpo_trainers.config.run_config import RunConfig, merge
from mmdpo_trainers.config.shipped import shipped_configs
from mmdpo_trainers.errors import ConfigError, RunFolderError, StageError
from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.processes.progress import Progress
from mmdpo_trainers.run.pipeline import run_pipeline

CONFIG = "qwen2_5_vl_mia_dpo"
SIZES = [(48, 48), (72, 36), (24, 60), (60, 48)]
COLOURS = ("red", "green", "blue", "yellow")


def write_data(folder: Path, pictures: int) -> Path:
    records = []
    for index, picture in enumerate(sample_pictures(pictures, seed=7)):
        picture.resize(SIZES[index % len(SIZES)]).save(folder / f"{index}.png")
        question = {"from": "human", "value": "<image>\nWhat colour is the circle?"}
        answer = {"from": "gpt", "value": COLOURS[index % len(COLOURS)]}
        records.append({"id": f"p{index}", "image": f"{index}.png", "conversations": [question, answer]})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def settings(folder: Path, make: Callable[[Path], Path] = make_tiny_qwen) -> RunConfig:
    (folder / "pictures").mkdir()
    every = {"sequence": {2: 1.0, 3: 1.0}, "grid": {2: 1.0, 4: 1.0}, "pip": {2: 1.0}}
    small: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": str(make(folder / "model")),
        "dtype": "float32",
        "threads": 1,
        "data": {"source": str(write_data(folder / "pictures", 16)), "image_folder": None, "holdout": 0.4},
        "augment": {"num_prompts": 20, "cell_size": 24, "margin": 4, "label": False},
        "generate": {"max_new_tokens": 4, "noise": "none"},
        "score": {"layer": 1},
        "select": {"min_perplexity": None, "max_length_ratio": None, "thresholds": every},
        "train": {
            "args": {
                "gradient_accumulation_steps": 1,
                "per_device_train_batch_size": 5,
                "lora_r": 4,
                "lora_alpha": 8,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "bf16": False,
            }
        },
        "evaluate": {"per_format": {"sequence": 4, "grid": 2, "pip": 2, "single": 4}, "max_new_tokens": 4},
        "report": {"heat_maps": 2},
    }
    values = merge(yaml.safe_load(shipped_configs()[CONFIG].read_text()), small)
    values["augment"]["num_images"] = {"sequence": {2: 1, 3: 1}, "grid": {2: 1, 4: 1}}
    return RunConfig.from_dict(values)


def test_a_whole_run(tmp_path: Path) -> None:
    config = settings(tmp_path)
    console = Console(file=io.StringIO())
    summary = run_pipeline(config, progress=Progress(console), console=console)
    run = tmp_path / "run"
    assert set(summary["pairs"]) == {"sequence", "grid", "pip"} and sum(summary["pairs"].values()) >= 12
    assert read_json(run / "score" / "summary.json")["statistic"] == "mean"
    scores = {record["id"]: record for record in read_jsonl(run / "score" / "scores.jsonl")}
    for record in scores.values():
        assert record["recorded"]["attention"] == record["attention"] and record["region"] is None
        assert record["ratio"] == record["ratio_mean"]
    assert any(record["ratio_mean"] != pytest.approx(record["ratio_mass"], abs=1e-3) for record in scores.values())
    log = [entry for entry in read_jsonl(run / "train" / "log.jsonl") if "loss" in entry]
    # Before its first step the policy is the reference.
    assert log[0]["loss"] - 0.1 * log[0]["nll_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-4) and log[-1]["rewards/margins"] > 0.1
    ratios = [value for entry in log for name, value in entry.items() if name.startswith("attn/ratio_")]
    assert ratios and all(0 < ratio < 1 for ratio in ratios)
    assert set(summary["accuracy"]["before"]) == set(summary["accuracy"]["after"]) == {"sequence", "grid", "pip", "single"}
    before, after = (read_jsonl(run / "evaluate" / moment / "answers.jsonl") for moment in ("before", "after"))
    assert [answer["response"] for answer in before] != [answer["response"] for answer in after]
    page = (run / "report.html").read_text()
    assert "<html" in page and 'src="http' not in page and read_json(run / "report" / "summary.json")["heat_maps"] >= 2


def test_a_run_in_4_bits(tmp_path: Path) -> None:
    """Answers, attention, training and evaluation are of the quantised model, the trained adapter beside it."""
    config, console = settings(tmp_path), Console(file=io.StringIO())
    whole = dataclasses.replace(config, run_dir=str(tmp_path / "whole"))
    config = RunConfig.from_dict(merge(config.to_dict(), {"quantization": {"load_in_4bit": True}}))
    summary = run_pipeline(config, progress=Progress(console), console=console)
    run_pipeline(whole, until="score", progress=Progress(console), console=console)
    run = tmp_path / "run"
    ratios = [
        [record["ratio"] for record in read_jsonl(folder / "score" / "scores.jsonl")] for folder in (run, tmp_path / "whole")
    ]
    assert len(ratios[0]) == len(ratios[1]) and ratios[0] != pytest.approx(ratios[1], abs=1e-6)
    log = [entry for entry in read_jsonl(run / "train" / "log.jsonl") if "loss" in entry]
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-4) and log[-1]["rewards/margins"] > 0.1
    assert read_json(run / "train" / "final" / "quantization.json")["bnb_4bit_quant_type"] == "nf4"
    before, after = (read_jsonl(run / "evaluate" / moment / "answers.jsonl") for moment in ("before", "after"))
    assert [answer["response"] for answer in before] != [answer["response"] for answer in after]
    assert set(summary["accuracy"]["after"]) == {"sequence", "grid", "pip", "single"}
    other = merge(config.to_dict(), {"quantization": {"bnb_4bit_quant_type": "fp4"}})
    with pytest.raises(
        RunFolderError, match='generate was made with other settings .quantization.bnb_4bit_quant_type: was "nf4", is "fp4"'
    ):
        run_pipeline(RunConfig.from_dict(other), progress=Progress(console), console=console)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"args": {"full_finetune": True}}}, "train.args.full_finetune: the model's weights are in 4 bits"),
        ({"train": {"args": {"fsdp": True}}}, "train.args.fsdp: expected the whole model in each process"),
    ],
)
def test_a_run_in_4_bits_that_cannot_be_is_refused_before_it_begins(tmp_path: Path, changes: Any, message: str) -> None:
    config = merge(settings(tmp_path, TINY["llava"]).to_dict(), {"quantization": {"load_in_4bit": True}})
    with pytest.raises(ConfigError, match=message):
        run_pipeline(RunConfig.from_dict(merge(config, changes)), progress=Progress(Console(file=io.StringIO())))
    assert not (tmp_path / "run" / "augment").exists()


@pytest.mark.parametrize("family", ["internvl", "gemma3", "mllama", pytest.param("qwen3_5", marks=pytest.mark.nightly)])
def test_other_families(tmp_path: Path, family: str) -> None:
    """Tiled pictures, pictures that see themselves both ways, cross-attended ones, which have no parts to ask about, layers with a state."""
    config, console = settings(tmp_path, TINY[family]), Console(file=io.StringIO())
    formats = {"sequence", "grid", "pip"}
    if family == "qwen3_5":
        with pytest.raises(StageError, match=r"score.layer: expected one of \[3\], which see pictures, for this model, got 1"):
            run_pipeline(config, progress=Progress(console), console=console)
        config = dataclasses.replace(config, score=dataclasses.replace(config.score, layer=None))
    if family == "mllama":
        with pytest.raises(StageError, match="with mllama only whole pictures can be told apart; leave the format out"):
            run_pipeline(config, progress=Progress(console), console=console)
        formats = {"sequence"}
        config = dataclasses.replace(
            config,
            run_dir=str(tmp_path / "sequences"),
            augment=dataclasses.replace(config.augment, formats={"sequence": 1.0}),
            evaluate=dataclasses.replace(config.evaluate, per_format={"sequence": 4, "single": 4}),
        )
    summary = run_pipeline(config, progress=Progress(console), console=console)
    run = Path(config.run_dir)
    assert set(summary["pairs"]) == formats and sum(summary["pairs"].values()) >= 8
    for record in read_jsonl(run / "score" / "scores.jsonl"):
        assert record["recorded"]["attention"] == record["attention"] and 0 <= record["ratio"] <= 1
    log = [entry for entry in read_jsonl(run / "train" / "log.jsonl") if "loss" in entry]
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-4) and log[-1]["rewards/margins"] > 0.1
    maps = read_json(run / "report" / "summary.json")["heat_maps"]
    assert maps == 0 if family == "mllama" else maps >= 2
    assert set(summary["accuracy"]["after"]) == {*formats, "single"}
