"""Rated answers, whole: every arm on a tiny model, prompts without pictures among the others; SteerLM's strings in training and evaluation."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Kill, command
from tiny_models import make_tiny_llava

from mmdpo_kernels import patch_model
from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.sections.answers import ScoreConfig
from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.run.pipeline import run_pipeline
from mmdpo_trainers.stages.evaluate import answer_batch

ARMS = ("best", "steerlm", "random_pairs")
STRING = "correctness:4,closeness:4"


def write_config(folder: Path) -> Path:
    texts = [{"id": f"t{k}", "conversations": [{"from": "human", "value": f"what is {w} ?"}, {"from": "gpt", "value": w}]}
             for k, w in enumerate(("red", "green", "blue", "circle"))]  # fmt: skip
    (folder / "texts.json").write_text(json.dumps(texts))
    values: dict[str, Any] = {
        "name": "tiny", "method": "rated", "model": str(make_tiny_llava(folder / "model")), "threads": 1,
        "data": {"pictures": 12, "questions_per_picture": 1},
        "augment": {"formats": {"single": 0.5, "sequence": 0.5}, "num_prompts": 12, "text_source": str(folder / "texts.json"),
                    "text_share": 0.25, "num_images": {"sequence": {2: 1.0}}},
        "generate": {"num_answers": 4, "do_sample": True, "temperature": 1.5, "max_new_tokens": 3, "batch_size": 4},
        "rate": {"attributes": ["correctness", "closeness"]},
        # No answer of a random model is right: what is rated is how close each is.
        "rank": {"min_gap": 0.01},
        "train": {"args": {"per_device_train_batch_size": 4, "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2, "max_steps": 4,
                           "logging_steps": 1}},
        "evaluate": {"per_format": {"sequence": 3, "single": 3}, "max_new_tokens": 3, "batch_size": 4},
        "arms": {
            "best": {"rank": {"make": "best"}, "train": {"preset": "rated_sft"}},
            "steerlm": {"rank": {"make": "attributes"}, "train": {"preset": "rated_sft"}},
            "random_pairs": {"rank": {"make": "random_pairs"}},
        },
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rated")
    assert cli.main(["run", str(write_config(folder)), "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


def test_every_arm_to_the_page(run: Path) -> None:
    summary = read_json(run / "summary.json")
    assert list(summary["arms"]) == list(ARMS) and summary["prompts"]["text"] == 3
    assert summary["generate"]["answers"] == 60 and 1 < summary["generate"]["distinct"] <= 4
    assert summary["rank"]["make"] == "pairs" and summary["pairs"]["text"] and summary["pairs"]["sequence"]
    assert summary["arms"]["random_pairs"]["pairs"] == summary["pairs"]
    assert set(summary["accuracy"]["after"]) == {"sequence", "single"} == set(summary["arms"]["steerlm"]["accuracy"]["after"])
    for arm, losses in {
        "": ["sigmoid"],
        "arms/best/": ["nll"],
        "arms/steerlm/": ["nll"],
        "arms/random_pairs/": ["sigmoid"],
    }.items():
        trained = read_json(run / f"{arm}train/summary.json")
        assert trained["loss_type"] == losses and trained["steps"] == 4
    assert read_json(run / "arms/best/rank/summary.json")["prompts"] == 15, "one record a prompt"
    page = (run / "report.html").read_text()
    assert 'id="ratings"' in page and "SFT on the best answer" in page and "Ratings of 60 answers to 15 prompts" in page
    assert "correctness" in page and "Text only" in page and "A prompt got 4 answers, " in page


def test_sft_runs_the_chosen_answer_only(run: Path) -> None:
    """Its loss is `nll` of that answer; the rejected one is the same text, which a token tree holds once."""
    for pair in read_jsonl(run / "arms/best/rank/pairs.jsonl"):
        assert pair["chosen"] == pair["rejected"]
    log = [entry for entry in read_jsonl(run / "arms/best/train/log.jsonl") if "loss" in entry]
    assert log[-1]["loss"] < log[0]["loss"] == pytest.approx(log[0]["nll_loss"])


def test_strings_of_ratings_in_training_and_at_test_time(run: Path) -> None:
    """Each answer's own ratings before training; evaluation of that arm alone asks for the highest, and keeps the question as it was."""
    rated = {record["id"]: record for record in read_jsonl(run / "rate/ratings.jsonl")}
    pairs = list(read_jsonl(run / "arms/steerlm/rank/pairs.jsonl"))
    assert len(pairs) == sum(len({text.strip() for text in record["responses"]} - {""}) for record in rated.values())
    for pair in pairs:
        asked = "".join(part.get("text", "<image>") for part in pair["prompt"][0]["content"])
        record, answer = rated[pair["source"]], pair["chosen"][0]["content"][0]["text"]
        index = [text.strip() for text in record["responses"]].index(answer)
        written = ",".join(f"{name}:{value:.0f}" for name, value in record["ratings"][index].items())
        assert asked == f"{record['prompt']}\n{written}"
    summary = read_json(run / "arms/steerlm/evaluate/after/summary.json")
    assert summary["asked"] == STRING and "asked" not in read_json(run / "evaluate/after/summary.json")
    answers = list(read_jsonl(run / "arms/steerlm/evaluate/after/answers.jsonl"))
    assert not any(STRING in answer["prompt"] for answer in answers)

    config = RunConfig.from_yaml(run / "config.yaml")
    loaded = load_model(Path(config.model), adapter=run / "arms/steerlm/train/final")
    patch_model(loaded.model)
    prompts = [{**a, "images": [str(run / "arms/steerlm/evaluate/after" / image) for image in a["images"]]} for a in answers]
    strings = [{**prompt, "prompt": f"{prompt['prompt']}\n{STRING}"} for prompt in prompts]
    with_it, without = (
        [each["response_ids"] for each in answer_batch(loaded, asked, options=config.evaluate, score=ScoreConfig())]
        for asked in (strings, prompts)
    )
    assert with_it == [answer["response_ids"] for answer in answers] != without


def test_another_string_asks_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is asked for is part of what an evaluation depends on; nothing else of the run does."""
    changed = ["--run", str(run), "--arm", "steerlm"]
    assert cli.main(["evaluate", *changed]) == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["arms"]["steerlm"]["rank"]["ask"] = {"correctness": 3.0}
    other = run.parent / "other.yaml"
    other.write_text(yaml.safe_dump(config))
    capsys.readouterr()
    assert cli.main(["evaluate", *changed, "--config", str(other)]) == 2
    assert "asked: was" in capsys.readouterr().err


def test_killed_in_rank_it_ends_as_undisturbed(run: Path) -> None:
    """Between its two files, and with a whole one that has no summary yet."""
    config, killed = run.parent / "tiny.yaml", run.parent / "killed"
    arguments = ["run", config, "--run-dir", killed, "--until", "rank"]
    assert command(*arguments, kill=Kill(killed / "rank", "pairs.jsonl", 1)) == -signal.SIGKILL
    assert not (killed / "rank/summary.json").exists() and (killed / "rate/summary.json").exists()
    assert cli.main(["run", str(config), "--run-dir", str(killed), "--until", "rank"]) == 0
    for name in ("generate/responses.jsonl", "rate/ratings.jsonl", "rank/pairs.jsonl", "rank/dropped.jsonl"):
        assert (killed / name).read_bytes() == (run / name).read_bytes()
    assert "seconds" in read_json(killed / "rank/summary.json")


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("generate", {"num_answers": 1}, "generate.num_answers: rank compares several answers to a prompt, got 1"),
        ("generate", {"do_sample": False}, "generate.num_answers: 4 greedy answers to a prompt would be one and the same"),
        (
            "rank",
            {"weights": {"correct": 1.0}},
            "rank.weights: 'correct' is none of rate.attributes, .*; did you mean 'correctness'?",
        ),
        ("arms", {"x": {"rank": {"ask": {"wit": 1.0}}}}, "arms.x.rank.ask: 'wit' is none of rate.attributes, .*; rate that too"),
    ],
)
def test_what_rank_would_refuse_is_refused_before_any_work(
    tmp_path: Path, section: str, changes: dict[str, Any], message: str
) -> None:
    values = yaml.safe_load(write_config(tmp_path).read_text())
    values[section] |= changes
    with pytest.raises(ConfigError, match=message):
        run_pipeline(RunConfig.from_dict({**values, "run_dir": str(tmp_path / "run")}))
    assert not (tmp_path / "run").exists()
