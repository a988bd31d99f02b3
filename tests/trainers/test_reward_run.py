"""Runs of reward models: a small one on the shipped base to the page, rated with afterwards, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mmdpo_trainers.answers.raters import Surroundings
from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.sections.rating import RateConfig
from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.run import pipeline
from mmdpo_trainers.training.reward.rater import rater_of

SMALL: dict[str, Any] = {
    "method": "reward",
    "model": "shapes_prior",
    "seed": 3,
    "threads": 1,
    "pairs": {"pictures": 24, "held_out": 0.5, "questions": {}},
    "train": {
        "args": {
            "facts": ["caption", "answer"],
            "learning_rate": 2e-3,
            "per_device_train_batch_size": 8,
            "num_train_epochs": 2,
            "lora_r": 4,
            "logging_steps": 1,
        },
        "held_out": 0.25,
    },
    "evaluate": {"batch_size": 5},
    "arms": {"no_facts": {"train": {"args": {"facts": []}}}},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder, output = tmp_path_factory.mktemp("runs") / "small", io.StringIO()
    config = RunConfig.from_dict({**SMALL, "run_dir": str(folder)})
    summary = pipeline.run_pipeline(config, console=Console(file=output, width=160))
    return folder, summary, output.getvalue()


def test_a_run_ends_with_the_rewards_of_every_arm(finished: tuple[Path, dict[str, Any], str]) -> None:
    folder, summary, output = finished
    assert summary == read_json(folder / "summary.json") and list(summary["arms"]) == ["reward", "no_facts"]
    found = {"before": summary["before"], **summary["arms"]}
    for figures in found.values():
        whole = figures["rewards"]["all"]
        assert whole["pairs"] == 12 and whole["interval"][0] <= whole["accuracy"] <= whole["interval"][1]
        assert sum(each["pairs"] for name, each in figures["rewards"].items() if name != "all") == 12
        assert sum(each["pairs"] for each in whole["calibration"]) == sum(whole["histogram"]["counts"]) == 12
    assert len({figures["rewards"]["all"]["margin"] for figures in found.values()}) == 3
    lines = list(read_jsonl(folder / "evaluate" / "after" / "rewards.jsonl"))
    right = sum(line["rewards"]["chosen"] > line["rewards"]["rejected"] for line in lines)
    assert right == summary["arms"]["reward"]["rewards"]["all"]["right"]
    log = list(read_jsonl(folder / "train" / "log.jsonl"))
    assert {"accuracy", "margin", "mean_reward", "accuracy_caption", "margin_answer"} <= set(log[0])
    assert any("eval_accuracy" in line and "eval_loss" in line for line in log)
    assert read_json(folder / "train" / "final" / "reward_model.json")["facts"] == ["caption", "answer"]
    assert read_json(folder / "arms" / "no_facts" / "train" / "final" / "reward_model.json")["facts"] == []
    assert "whose chosen response has the higher reward" in output and "untrained head" in output


def test_the_page_of_a_reward_model(finished: tuple[Path, dict[str, Any], str]) -> None:
    page = (finished[0] / "report.html").read_text()
    places = [page.index(f'id="{name}"') for name in ("reward-accuracy", "reward-margins", "training", "pairs")]
    assert places == sorted(places)
    assert "untrained head" in page and "without facts" in page and "Calibration" in page and "Margins of held-out pairs" in page
    assert "of held-out pairs (" in page and 'id="accuracy"' not in page


def test_its_model_rates_answers(finished: tuple[Path, dict[str, Any], str]) -> None:
    """Held-out pairs as prompts with two answers: the same rewards, whatever batch they come in."""
    folder = finished[0]
    options = RateConfig(source="reward_model", judge=str(folder / "train" / "final"), facts=["answer", "caption"])
    rater = rater_of(options, Surroundings(folder=folder, device="cpu"))
    lines = list(read_jsonl(folder / "evaluate" / "after" / "rewards.jsonl"))
    records = [{**line, "images": [str(folder / "evaluate" / "after" / image) for image in line["images"]]} for line in lines]
    answers = [[line[name][0]["content"] for name in ("chosen", "rejected")] for line in lines]
    for line, ratings in zip(lines, rater.rate(records, answers), strict=True):
        assert [each.value() for each in ratings] == pytest.approx(
            [line["rewards"][name] for name in ("chosen", "rejected")], abs=1e-4
        )


def test_the_rate_stage_with_a_reward_model(finished: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    """Answers of another run, two a prompt; the check on pairs finds what the rewards say."""
    folder, run = finished[0], tmp_path / "run"
    lines = list(read_jsonl(folder / "evaluate" / "after" / "rewards.jsonl"))
    asked = [
        {
            **{name: line[name] for name in ("id", "answer", "options", "caption")},
            **{"format": "single", "source_id": line["id"], "target": 0, "num_images": 1, "region": None, "patch_grid": None},
            "images": [str((folder / "evaluate" / "after" / line["images"][0]).resolve())],
            "prompt": line["prompt"][0]["content"],
            "responses": [line[name][0]["content"] for name in ("chosen", "rejected")],
        }
        for line in lines
    ]
    asked[0]["responses"][1] = ""
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(record) + "\n" for record in asked))
    command = ["rate", "--run", str(run), "--model", "shapes_prior", "--input", str(tmp_path / "responses.jsonl")]
    command += ["--source", "reward_model", "--judge", str(folder / "train" / "final"), "--batch-size", "5"]
    assert cli.main([*command, "--facts", "[answer]"]) == 2
    assert cli.main([*command, "--facts", "[answer, caption]"]) == 0
    ratings, summary = list(read_jsonl(run / "rate" / "ratings.jsonl")), read_json(run / "rate" / "summary.json")
    assert summary["scale"] is None and list(summary["mean"]) == ["reward"] and summary["unrated"] == {"empty": 1}
    assert summary["check"]["agree"]["total"] > 0
    for line, found in zip(lines, ratings, strict=True):
        expected = [line["rewards"][name] for name in ("chosen", "rejected")]
        values = [rating["reward"] for rating in found["ratings"] if rating is not None]
        assert values == pytest.approx(expected[: len(values)], abs=1e-4)
    assert ratings[0]["ratings"][1] is None and len(ratings) == 12


def test_a_continued_evaluation_gives_the_same_file(
    finished: tuple[Path, dict[str, Any], str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished[0]
    file, summary = (folder / "evaluate" / "after" / name for name in ("rewards.jsonl", "summary.json"))
    whole, figures = file.read_bytes(), read_json(summary)
    lines = whole.splitlines(keepends=True)
    # As if killed while it wrote its eighth line.
    file.write_bytes(b"".join(lines[:7]) + lines[7][:9])
    summary.unlink()
    assert cli.main(["evaluate", "--run", str(folder), "--moment", "after"]) == 0
    assert file.read_bytes() == whole and read_json(summary)["rewards"] == figures["rewards"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate": {"input": __file__}}, "evaluate.input: a reward model rates answers and gives none"),
        ({"train": {"args": {"facts": ["truth"]}}}, "train.args: facts: expected some of answer, caption, options"),
        ({"train": {"args": {"beta": 0.2}}}, "train.args: beta: a reward model compares rewards"),
        ({"train": {"args": {"fact": ["answer"]}}}, "RewardConfig has no field 'fact'; did you mean 'facts'"),
        (
            {"train": {"preset": "mdpo_paper"}},
            "train.preset must be one of bradley_terry, llava_rlhf or null, got the text 'mdpo_paper'",
        ),
    ],
)
def test_refused_before_any_work(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = RunConfig.from_dict({**SMALL, "run_dir": str(tmp_path / "run"), "arms": {}, **changes})
    with pytest.raises(ConfigError, match=message):
        pipeline.run_pipeline(config)
    assert not (tmp_path / "run" / "pairs").exists()
