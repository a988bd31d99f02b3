"""`mmdpo run` on a small random checkpoint: to the page, and to the same result whatever kills it on the way."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Kill, command
from tiny_models import make_tiny_llava

from mmdpo_trainers.files.atomic import read_json

MOMENTS = {
    "augment": "state.json",
    "generate": "responses.jsonl",
    "score": "scores.jsonl",
    "train": "checkpoint-*/trainer_state.json",
    "evaluate/after": "answers.jsonl",
}
"""Stage -> file whose first content is the moment of a kill."""


def write_config(folder: Path) -> Path:
    cells = {"cell_size": 24, "margin": 0, "label": False, "num_images": {"sequence": {2: 1, 3: 1}, "grid": {2: 1, 4: 1}}}
    every = {"sequence": {2: 1.0, 3: 1.0}, "grid": {2: 1.0, 4: 1.0}, "pip": {2: 1.0}}
    values: dict[str, Any] = {
        "model": str(make_tiny_llava(folder / "model")),
        "threads": 1,
        "data": {"pictures": 30, "questions_per_picture": 2},
        "augment": {"num_prompts": 48, **cells},
        # Without recorded attention, score is a stage long enough to be killed in.
        "generate": {"max_new_tokens": 4, "batch_size": 4, "record_attention": False},
        "score": {"batch_size": 4},
        "select": {"min_perplexity": None, "max_length_ratio": None, "thresholds": every},
        "train": {
            "replay": 0.25,
            "args": {"per_device_train_batch_size": 4, "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-3},
        },
        "evaluate": {"per_format": {"sequence": 6, "grid": 6, "pip": 4, "single": 6}, "max_new_tokens": 4, "batch_size": 4},
        "report": {"heat_maps": 1},
        "arms": {"sft": {"train": {"args": {"loss_type": ["nll"], "loss_weights": [1.0], "max_steps": 2}}}},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    return folder / "tiny.yaml"


def outcome(run: Path) -> dict[str, Any]:
    summary = read_json(run / "summary.json")
    results = {key: summary[key] for key in ("accuracy", "pairs", "dropped", "seed", "arms", "prompts")}
    for name in ("select/pairs.jsonl", "evaluate/before/answers.jsonl", "evaluate/after/answers.jsonl"):
        results[name] = (run / name).read_text()
    losses = [json.loads(line) for line in (run / "train/log.jsonl").read_text().splitlines()]
    results["losses"] = [(entry["step"], entry["loss"]) for entry in losses if "loss" in entry]
    return results


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs, beside its configuration."""
    folder = tmp_path_factory.mktemp("whole")
    assert command("run", write_config(folder), "--run-dir", folder / "run") == 0
    return folder / "run"


@pytest.mark.longest
@pytest.mark.parametrize("stages", [("generate", "train"), ("augment", "score", "evaluate/after")], ids="-".join)
def test_killed_a_run_ends_as_an_undisturbed_one(whole: Path, tmp_path: Path, stages: tuple[str, ...]) -> None:
    config, expected = whole.parent / "tiny.yaml", outcome(whole)
    assert sum(expected["pairs"].values()) > 20 and set(expected["accuracy"]["after"]) == {"sequence", "grid", "pip", "single"}
    page = (whole / "report.html").read_text()
    assert "<html" in page and 'src="http' not in page

    run = tmp_path / "killed"
    for stage in stages:
        kill = Kill(run / stage, MOMENTS[stage], 1)
        assert command("run", config, "--run-dir", run, kill=kill) == -signal.SIGKILL
        assert not (run / stage / "summary.json").exists()
    assert command("run", config, "--run-dir", run) == 0
    assert outcome(run) == expected
