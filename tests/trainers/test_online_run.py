"""Runs of online DPO: a small one on the shipped base with its arms, prompts with truths of the user's own, what a run says of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from judge_server import Asked, JudgeServer, Said, ratings
from tiny_models import make_tiny_llava, sample_pictures

from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.config.run_config import RunConfig, merge
from mmdpo_trainers.config.stages import STAGES
from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.methods import online_settings, preset_args
from mmdpo_trainers.run.pipeline import run_pipeline

SMALL: dict[str, Any] = {
    "name": "small",
    "method": "online_dpo",
    "model": "shapes_prior",
    "threads": 1,
    "pairs": {
        "source": "shapes_prior",
        "pictures": 12,
        "held_out": 0.5,
        "captions": 0.0,
        "questions": {"disagree": 2, "agree": 2},
    },
    "rate": {"match": "choice"},
    "online": {"max_new_tokens": 3, "samples": 6, "temperature": 2.0, "min_gap": 2.0},
    "train": {
        "args": {"per_device_train_batch_size": 4, "logging_steps": 1, "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-3}
    },
    "evaluate": {"batch_size": 4, "max_new_tokens": 3},
    "arms": {
        "dpo": {"online": {"alpha": 0.0}},
        "extra_negatives": {"train": {"preset": "online_negatives"}},
    },
}


def test_a_run_with_a_control_and_extra_negatives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    run = tmp_path / "run"
    assert cli.main(["run", str(tmp_path / "small.yaml"), "--run-dir", str(run)]) == 0
    summary = read_json(run / "summary.json")
    records = {record["id"]: record for record in read_jsonl(run / "pairs" / "pairs.jsonl")}
    for arm, folder in (("online_dpo", run), ("extra_negatives", run / "arms" / "extra_negatives")):
        lines = list(read_jsonl(folder / "train" / "online.jsonl"))
        assert {line["record"] for line in lines} == set(records) and len(lines) == 12
        found = summary["arms"][arm]["online"]
        assert found["answers"] == 72 and sum(found["outcomes"].values()) == 12 and found["trained"]["sampled"] > 3
        for line in lines:
            if line["trained"] == "sampled":
                truth, texts = records[line["record"]]["answer"], line["answers"]
                assert truth not in texts[line["rejected"]] and line["ratings"][line["rejected"]] <= 2.0
                assert arm == "extra_negatives" or (truth in texts[line["chosen"]] and line["ratings"][line["chosen"]] == 4.0)
    assert summary["arms"]["dpo"]["online"] is None and not (run / "arms" / "dpo" / "train" / "online.jsonl").exists()
    log = [entry for entry in read_jsonl(run / "train" / "log.jsonl") if "loss" in entry]
    assert all("online/ties" in entry and "online/sampling_time" not in entry for entry in log)
    logged = next(read_jsonl(run / "arms" / "extra_negatives" / "train" / "log.jsonl"))
    assert "rewards/sampled_margins" in logged
    page = (run / "report.html").read_text()
    assert 'id="sampled"' in page and "DPO with sampled negatives" in page and "rated 4.00" in page
    # What was sampled with is part of what a training is.
    assert "online.temperature" in read_json(run / "train" / "state.json")["parts"]
    assert not [name for name in read_json(run / "arms" / "dpo" / "train" / "state.json")["parts"] if name.startswith("online.")]
    capsys.readouterr()
    assert cli.main(["run", str(tmp_path / "small.yaml"), "--run-dir", str(run)]) == 0
    assert capsys.readouterr().err.count("done before") == 9
    assert cli.main(["train", "--run", str(run), "--temperature", "1.5"]) == 2
    assert "online.temperature: was 2.0" in capsys.readouterr().err


def test_prompts_with_truths_of_one_s_own(tmp_path: Path) -> None:
    """Neither chosen nor rejected: what is held out are questions."""
    lines = []
    for index, picture in enumerate(sample_pictures(10, seed=3)):
        picture.save(tmp_path / f"{index}.png")
        prompt: Any = "<image>\nwhat colour is the circle ?"
        prompt = prompt if index % 2 else [{"role": "user", "content": prompt}]
        lines.append(json.dumps({"id": f"q{index}", "images": [f"{index}.png"], "prompt": prompt, "answer": "red"}) + "\n")
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    values = {
        **SMALL,
        "model": str(make_tiny_llava(tmp_path / "model")),
        "pairs": {"source": str(tmp_path / "prompts.jsonl"), "held_out": 0.3},
        "rate": {"attributes": ["closeness"]},
        "online": {"max_new_tokens": 16, "samples": 12},
        "arms": {},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(values))
    run = tmp_path / "run"
    assert cli.main(["run", str(tmp_path / "own.yaml"), "--run-dir", str(run)]) == 0
    summary = read_json(run / "summary.json")
    assert summary["arms"]["online_dpo"]["online"]["records"] == 7 and set(summary["before"]["counts"].values()) == {3}
    assert set(summary["arms"]["online_dpo"]["online"]["trained"]) == {"sampled", "skipped"}
    assert not (run / "pairs" / "held_out.jsonl").exists() and 'id="sampled"' in (run / "report.html").read_text()


def test_a_preset_says_what_the_section_does_not() -> None:
    def config(**values: Any) -> RunConfig:
        return RunConfig.from_dict({"method": "online_dpo", **values})

    assert (online_settings(config()).alpha, online_settings(config()).without_pair) == (1.0, "skip")
    assert online_settings(config(online={"without_pair": "offline"})).without_pair == "offline"
    mixed = config(train={"preset": "mixed_negatives"}, online={"temperature": 0.7})
    assert (online_settings(mixed).alpha, online_settings(mixed).use, online_settings(mixed).temperature) == (
        0.5,
        "negative",
        0.7,
    )
    assert preset_args(mixed)["extra_negative"] == "sampled" and "online" not in preset_args(mixed)
    assert online_settings(config(online={"alpha": 0.0})).alpha == 0.0
    # Nothing is sampled unless it is asked for.
    assert online_settings(RunConfig(method="mdpo")).alpha == 0.0
    assert online_settings(RunConfig.from_dict({"method": "mdpo", "online": {"alpha": 0.3}})).alpha == 0.3
    with pytest.raises(ConfigError, match="online.alpha: expected 0 or more and at most 1"):
        config(online={"alpha": 1.5})
    assert "online" not in STAGES


def test_flags_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    assert "--alpha" in shown and "--max-new-tokens" in shown and "is online in a" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": {"source": "file", "file": "x.jsonl"}}, "no file has ratings of answers that are sampled"),
        ({"train": {"args": {"max_tokens_per_batch": 500}}}, "max_tokens_per_batch: with online answers the lengths"),
        ({"online": {"use": "negative"}}, "online.use: a sampled negative needs a branch"),
        ({"online": {"samples": 1}}, "online.samples: expected 2 or more"),
    ],
)
def test_what_cannot_be_is_said_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.jsonl").write_text("")
    with pytest.raises(ConfigError, match=message):
        run_pipeline(RunConfig.from_dict(merge({**SMALL, "arms": {}, "run_dir": "run"}, changes)))
    assert not (tmp_path / "run").exists()


def test_a_judge_ranks_and_is_asked_nothing_twice(tmp_path: Path) -> None:
    """Its refusals are of records; a training that is done again, as after a kill, finds every reply in its folder."""

    def plays(asked: Asked) -> str | Said:
        return Said(400, b'{"error": "content filter"}') if "r" not in asked.answer else ratings(min(4, len(asked.answer) % 5))

    with JudgeServer(plays) as server:
        values = {
            **SMALL,
            "run_dir": str(tmp_path / "run"),
            "arms": {},
            "rate": {"source": "endpoint", "endpoint": {"url": server.url, "model": "m", "concurrency": 2}},
            "online": {**SMALL["online"], "min_gap": 0.0},
        }
        run_pipeline(RunConfig.from_dict(values), until="train")
        train = tmp_path / "run" / "train"
        lines = list(read_jsonl(train / "online.jsonl"))
        rated = [pair for line in lines for pair in zip(line["answers"], line["ratings"], strict=True)]
        assert all((rating is None) == ("r" not in text) for text, rating in rated) and any(rating is None for _, rating in rated)
        refused = [line for line in lines if None in line["ratings"]]
        assert all("content filter" in line["problems"][0] for line in refused)
        asked, weights = len(server.asked), (train / "final" / "adapter_model.safetensors").read_bytes()
        assert 0 < asked < len(rated), "equal answers to a record are one question"
        for name in ("summary.json", "online.jsonl"):
            (train / name).unlink()
        for checkpoint in train.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        run_pipeline(RunConfig.from_dict(values), until="train")
        assert len(server.asked) == asked and list(read_jsonl(train / "online.jsonl")) == lines
        assert (train / "final" / "adapter_model.safetensors").read_bytes() == weights
