"""The shipped configurations: each is read and looked through before a run, and those for preference data of one's own run to the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny_llava, make_tiny_qwen, sample_pictures

from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.config.run_config import RunConfig, merge
from mmdpo_trainers.config.shipped import CONFIGS
from mmdpo_trainers.config.values import read_yaml
from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.methods import METHODS, presets
from mmdpo_trainers.run.pipeline import run_pipeline
from mmdpo_trainers.stages import pairs
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder

NAMES = sorted(path.name for path in CONFIGS.glob("*.yaml"))
OWN_PAIRS = {"llava_mdpo.yaml": make_tiny_llava, "qwen2_5_vl_mdpo.yaml": make_tiny_qwen}
REAL = {
    **OWN_PAIRS,
    "llava_mdpo_qlora.yaml": make_tiny_llava,
    "llava_bdhs.yaml": make_tiny_llava,
    "llava_reward.yaml": make_tiny_llava,
    "llava_mia_dpo.yaml": make_tiny_llava,
    "llava_mia_dpo_judge.yaml": make_tiny_llava,
    "llava_online.yaml": make_tiny_llava,
    "qwen2_5_vl_mia_dpo.yaml": make_tiny_qwen,
    "llava_rated.yaml": make_tiny_llava,
}


def write_pairs(folder: Path, count: int = 10) -> Path:
    """Preference pairs as a user has them: TRL's columns, pictures as files beside them."""
    lines = []
    for index, picture in enumerate(sample_pictures(count, seed=3)):
        picture.save(folder / f"{index}.png")
        question = [{"role": "user", "content": "<image>\nWhat colour is the circle?"}]
        record = {
            "id": f"p{index}",
            "images": [f"{index}.png"],
            "prompt": question,
            "chosen": "red",
            "rejected": "blue and green",
        }
        lines.append(json.dumps(record) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder / "pairs.jsonl"


def write_conversations(folder: Path) -> Path:
    turns = [{"from": "human", "value": "<image>\nWhat colour is it?"}, {"from": "gpt", "value": "red"}]
    records = []
    for index, picture in enumerate(sample_pictures(12)):
        picture.save(folder / f"{index}.png")
        records.append({"id": f"a{index}", "image": f"{index}.png", "conversations": turns})
    (folder / "llava.json").write_text(json.dumps(records))
    return folder / "llava.json"


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_passes_the_checks_before_a_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model and data in the place of the user's; nothing is run after the checks."""

    class Checked(Exception):  # noqa: N818 - the checks are done
        pass

    def stop(*args: object, **kwargs: object) -> None:
        raise Checked

    monkeypatch.setattr("mmdpo_trainers.run.pipeline.run_stage", stop)
    values = read_yaml(CONFIGS / name)
    assert values["name"] == Path(name).stem, "runs/<name> is told by its configuration"
    mine: dict[str, Any] = {"run_dir": str(tmp_path / "run")}
    if name in REAL:
        mine |= {"model": str(REAL[name](tmp_path / "model"))}
        source, folder = str(write_pairs(tmp_path)), str(tmp_path)
        mine |= {"score": {"layer": None}, "pairs": {"source": source}}
        mine |= {"data": {"source": str(write_conversations(tmp_path)), "image_folder": folder}}
    config = RunConfig.from_dict(merge(values, mine))
    with pytest.raises(Checked):
        run_pipeline(config)


@pytest.mark.parametrize("name", OWN_PAIRS)
def test_mdpo_has_the_paper_s_settings(name: str) -> None:
    config = RunConfig.from_yaml(CONFIGS / name)
    args, paper = config.train.args, presets(METHODS["mdpo"])["mdpo_paper"]
    assert {key: tuple(args[key]) if isinstance(paper[key], tuple) else args[key] for key in paper if key in args} == {
        key: value for key, value in paper.items() if key != "corruption_draw"
    }
    assert args["per_device_train_batch_size"] * args["gradient_accumulation_steps"] == 32
    assert not config.arms, "one training"
    assert 0 < config.pairs.held_out <= 0.05 and config.pairs.max_held_out is not None


def test_bdhs_has_the_paper_s_settings() -> None:
    config, paper = RunConfig.from_yaml(CONFIGS / "llava_bdhs.yaml"), presets(METHODS["bdhs"])["bdhs_paper"]
    args = config.train.args
    assert {key: args[key] for key in paper} == paper and (paper["lora_r"], paper["lora_alpha"]) == (128, 256)
    batch = args["per_device_train_batch_size"] * args["gradient_accumulation_steps"]
    assert 1e-7 <= args["learning_rate"] <= 5e-6 and args["num_train_epochs"] in (3, 5, 7) and batch in (16, 32, 48)
    found = config.hallucinate
    assert (found.hide, found.max_tries, found.max_similarity, found.swap_yes_no, found.unresolved) == (
        0.99,
        5,
        0.97,
        0.5,
        "keep",
    )


@pytest.mark.parametrize(("share", "most", "held_out"), [(0.01, None, 1), (0.5, None, 5), (0.5, 2, 2), (0.5, 1, 1)])
def test_held_out_pairs_are_a_share_with_a_cap(tmp_path: Path, share: float, most: int | None, held_out: int) -> None:
    """One at least, or training would come to its end before anybody noticed that there is nothing to evaluate on."""
    options = {"source": str(write_pairs(tmp_path)), "held_out": share, "max_held_out": most}
    config = RunConfig.from_dict({"method": "mdpo", "pairs": options})
    context = StageContext(run=RunFolder(tmp_path / "run"), config=config, stage="pairs")
    assert pairs.run(context) == {"layout": "TRL", "pairs": {"all": 10 - held_out}, "held_out": {"all": held_out}}


@pytest.mark.parametrize(("name", "make"), OWN_PAIRS.items())
def test_own_pairs_run_to_the_page(name: str, make: Callable[[Path], Path], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    run = tmp_path / "run"
    smaller = {
        "model": make(tmp_path / "model"),
        "pairs.source": write_pairs(tmp_path / "data"),
        "dtype": "float32",
        "threads": 1,
        "train.args.bf16": "false",
        "train.args.gradient_accumulation_steps": 2,
        "train.args.per_device_train_batch_size": 4,
        "train.args.learning_rate": 0.01,
        "train.args.logging_steps": 1,
        "evaluate.max_new_tokens": 4,
    }
    options = [word for key, value in smaller.items() for word in ("--set", f"{key}={value}")]
    assert cli.main(["run", str(CONFIGS / name), "--run-dir", str(run), *options]) == 0
    sides = {side: list(read_jsonl(run / "pairs" / f"{side}.jsonl")) for side in ("pairs", "held_out")}
    assert {side: len(records) for side, records in sides.items()} == {"pairs": 9, "held_out": 1}, "one pair in ten, not in fifty"
    log = [entry for entry in read_jsonl(run / "train" / "log.jsonl") if "loss" in entry]
    assert len(log) == 6, "three epochs of two steps"
    assert log[-1]["loss"] < log[0]["loss"]
    adapter = read_json(run / "train" / "final" / "adapter_config.json")
    assert (adapter["r"], adapter["lora_alpha"]) == (64, 128)
    summary = read_json(run / "summary.json")
    assert list(summary["arms"]) == ["mdpo"]
    page = (run / "report.html").read_text()
    assert f"{RunConfig.from_yaml(CONFIGS / name).report.title}</h1>" in page
    assert "What colour is the circle?" in page and "blue and green" in page and "Where picture and prior" not in page
