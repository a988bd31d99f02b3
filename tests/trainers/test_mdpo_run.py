"""mDPO runs: a whole small one on the shipped base, figures of held-out pairs, data of the user's own, what is refused."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.errors import ConfigError, StageError
from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.methods.held_out import flat_figures, held_out_figures, reward_curves
from mmdpo_trainers.report.numbers import number
from mmdpo_trainers.run import pipeline
from mmdpo_trainers.stages import evaluate, pairs, report
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder

ARMS = {
    "dpo": {"train": {"args": {"loss_type": ["sigmoid"]}}},
    "dpo_no_image": {"train": {"args": {"loss_type": ["sigmoid"], "no_image": True}}},
}
SMALL: dict[str, Any] = {
    "method": "mdpo",
    "model": "shapes_prior",
    "seed": 3,
    "threads": 1,
    "pairs": {"pictures": 24, "held_out": 0.5, "questions": {"disagree": 6, "agree": 3}},
    "train": {
        "preset": "mdpo_paper",
        "args": {"learning_rate": 2e-3, "per_device_train_batch_size": 8, "num_train_epochs": 2, "lora_r": 4, "logging_steps": 1},
    },
    "evaluate": {"max_new_tokens": 40, "batch_size": 8, "match": "choice"},
    "report": {"pairs": 4, "title": "Pictures <against> prior"},
    "arms": ARMS,
}


def go(config: RunConfig) -> tuple[dict[str, Any], str]:
    output = io.StringIO()
    return pipeline.run_pipeline(config, console=Console(file=output, width=120)), output.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("runs") / "small"
    summary, output = go(RunConfig.from_dict({**SMALL, "run_dir": str(folder)}))
    return folder, summary, output


def test_a_run_ends_with_the_figures_of_every_arm(finished: tuple[Path, dict[str, Any], str]) -> None:
    folder, summary, output = finished
    assert summary == read_json(folder / "summary.json") and summary["method"] == "mdpo"
    assert list(summary["arms"]) == ["mdpo", "dpo", "dpo_no_image"]
    groups = {f"{kind}/{side}" for kind in ("answer", "caption") for side in ("disagree", "agree")}
    assert set(summary["before"]["accuracy"]) == groups and summary["before"]["counts"]["caption/disagree"] == 6
    for figures in summary["arms"].values():
        assert set(figures["accuracy"]) == groups
        assert set(figures["held_out"]) == {"answer", "caption", "all"}
        assert figures["held_out"]["all"]["pairs"] == 12
        assert figures["curves"]["step"] == [1, 2, 3, 4, 5, 6]
        assert figures["curves"]["rewards/chosen"][0] == pytest.approx(0, abs=1e-6), "the first step starts at the reference"
        assert {"rewards/chosen_answer", "rewards/chosen_caption"} <= set(figures["curves"])
    assert (
        "rewards/corrupted" in summary["arms"]["mdpo"]["curves"] and "rewards/corrupted" not in summary["arms"]["dpo"]["curves"]
    )
    assert "gap caption crop" in output
    rewards = {arm: figures["held_out"]["all"]["rewards"]["chosen"] for arm, figures in summary["arms"].items()}
    assert len(set(rewards.values())) == 3 and all(abs(reward) > 1e-4 for reward in rewards.values()), (
        "every arm was trained its own way"
    )


def test_figures_are_those_of_the_files(finished: tuple[Path, dict[str, Any], str]) -> None:
    folder, summary, _ = finished
    before = {r["id"]: r["logps"] for r in read_jsonl(folder / "evaluate/before/held_out.jsonl")}
    after = {r["id"]: r["logps"] for r in read_jsonl(folder / "arms/dpo/evaluate/after/held_out.jsonl")}
    assert before.keys() == after.keys() and not before.keys() & {r["id"] for r in read_jsonl(folder / "pairs/pairs.jsonl")}
    found = summary["arms"]["dpo"]["held_out"]["all"]
    assert found["gap"]["blank"] == pytest.approx(sum(x["chosen"] - x["blank"] for x in after.values()) / 12)
    assert found["rewards"]["rejected"] == pytest.approx(
        0.1 * sum(after[i]["rejected"] - before[i]["rejected"] for i in after) / 12
    )


def test_a_finished_run_is_left_alone_and_its_pairs_can_be_made_anew(finished: tuple[Path, dict[str, Any], str]) -> None:
    folder, summary, _ = finished
    again, _ = go(RunConfig.from_dict({**SMALL, "run_dir": str(folder)}))
    assert again["arms"] == summary["arms"]
    run = RunFolder(folder)
    saved = {name: (folder / name).read_bytes() for name in ("pairs/pairs.jsonl", "pairs/held_out.jsonl", "pairs/prompts.jsonl")}
    context = StageContext(run=run, config=RunConfig.from_dict({**SMALL, "run_dir": str(folder)}), stage="pairs")
    assert pairs.run(context)["pairs"].keys() <= {"answer/agree", "answer/disagree", "caption/agree", "caption/disagree"}
    assert saved == {name: (folder / name).read_bytes() for name in saved}


def test_the_page_shows_arms_rewards_and_pictures(finished: tuple[Path, dict[str, Any], str]) -> None:
    folder, summary, _ = finished
    page = (folder / "report.html").read_text()
    # But for names of namespaces, and the address of a judge among the settings, which are shown as text.
    assert "Pictures &lt;against&gt; prior" in page and "http" not in re.sub(r"http://(www\.w3\.org|localhost:8000)\S*", "", page)
    for words in ("Chosen reward over training", "DPO (No Image)", "Gap, crop", "log p(chosen)", "Chosen reward, captions"):
        assert words in page, words
    assert "Where the answers look" not in page and "Attention ratios" not in page, "sections of MIA-DPO runs"
    gap = summary["arms"]["mdpo"]["held_out"]["caption"]["gap"]["crop"]
    assert f"<td>{number(gap, '.2f')} <small>" in page
    assert page.count("data:image/") >= 4


def test_other_seeds_stand_beside_the_run(finished: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    folder, summary, _ = finished
    other = tmp_path / "other"
    other.mkdir()
    (other / "summary.json").write_text(json.dumps(summary))
    values = {**SMALL, "run_dir": str(folder), "report": {**SMALL["report"], "seeds": [str(other)]}}
    go(RunConfig.from_dict(values))
    page = (folder / "report.html").read_text()
    chosen = number(summary["arms"]["dpo"]["held_out"]["answer"]["gap"]["crop"], ".2f")
    assert "Over seeds" in page and f"{chosen} ({chosen} to {chosen})" in page
    values["report"]["seeds"] = [str(tmp_path)]
    with pytest.raises(ConfigError, match=r"report\.seeds.*not the folder of a finished run with held-out pairs"):
        go(RunConfig.from_dict(values))


def test_figures_of_held_out_pairs() -> None:
    def record(id: str, kind: str | None, chosen: float, rejected: float, crop: float, blank: float) -> dict[str, Any]:
        logps = {"chosen": chosen, "rejected": rejected, "crop": crop, "blank": blank}
        return {"id": id, "logps": logps} | ({"kind": kind} if kind else {})

    base = [record("a", "answer", -2, -1, -3, -4), record("b", None, -10, -9, -10, -11)]
    after = [record("b", None, -12, -19, -20, -11), record("a", "answer", -1, -2, -3, -5)]
    found = held_out_figures(after, base, beta=0.5)
    assert set(found) == {"all", "answer"}
    assert found["all"]["gap"] == {"crop": 5.0, "blank": 1.5} and found["all"]["preferred"] == 1.0
    assert found["all"]["rewards"] == {"chosen": -0.25, "rejected": -2.75, "crop": -2.5, "blank": -0.25}
    assert found["answer"]["rewards"]["chosen"] == 0.5
    before = held_out_figures(base, beta=0.5)
    assert before["all"]["preferred"] == 0.0 and "rewards" not in before["all"]
    flat = flat_figures({"accuracy": {"g": 0.5}, "held_out": found})
    assert flat["accuracy/g"] == 0.5 and flat["gap/answer/crop"] == 2.0 and flat["reward/all/rejected"] == -2.75


def test_curves_are_the_rewards_of_the_log() -> None:
    log = [
        {
            "step": 2,
            "loss": 1.0,
            "rewards/chosen": 0.1,
            "rewards/chosen_caption": 0.2,
            "rewards/corrupted_margins": 9,
            "rewards/margins": 9,
        },
        {"step": 2, "eval_loss": 1.0, "eval_rewards/chosen": 7},
        {"step": 4, "loss": 0.5, "rewards/chosen": -0.1, "rewards/corrupted": 0.3},
    ]
    assert reward_curves(log) == {
        "step": [2, 4],
        "rewards/chosen": [0.1, -0.1],
        "rewards/chosen_caption": [0.2, None],
        "rewards/corrupted": [None, 0.3],
    }


def own_data(folder: Path) -> Path:
    records = []
    for index in range(12):
        name = f"{index % 6}.png"
        Image.new("RGB", (48, 48), (40 * (index % 6), 0, 99)).save(folder / name)
        record = {"id": f"q{index}", "images": [name], "prompt": "What colour is it?", "chosen": "red", "rejected": "blue"}
        records.append(record)
    (folder / "mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "mine.jsonl"


def test_copies_of_a_picture_and_lists_that_share_one_are_on_one_side(tmp_path: Path) -> None:
    """Whatever the files are called and whichever folder they are in."""
    splits = []
    for folder, prefix in ((tmp_path / "a", "x"), (tmp_path / "b", "y")):
        folder.mkdir()
        records = []
        for index in range(12):
            names = [f"{prefix}{index}.png", f"{prefix}{index}-copy.png"]
            for name in names:
                Image.new("RGB", (48, 48), (20 * index, 0, 99)).save(folder / name)
            # Every third record shows the next one's picture too.
            images = [names[0], f"{prefix}{index + 1}.png"] if index % 3 == 0 else [names[1]]
            records.append({"id": index, "images": images, "prompt": "What is it?", "chosen": "red", "rejected": "blue"})
        (folder / "mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        values = {
            "method": "mdpo",
            "pairs": {"source": str(folder / "mine.jsonl"), "held_out": 0.4},
            "run_dir": str(folder / "run"),
        }
        context = StageContext(run=RunFolder(folder / "run"), config=RunConfig.from_dict(values), stage="pairs")
        pairs.run(context)
        sides = [list(read_jsonl(context.folder / f"{name}.jsonl")) for name in ("pairs", "held_out")]
        shown = [
            {(context.folder / image).resolve().read_bytes() for record in side for image in record["images"]} for side in sides
        ]
        assert shown[0] and shown[1] and not shown[0] & shown[1]
        splits.append([record["id"] for record in sides[1]])
    assert splits[0] == splits[1]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_pairs_without_their_pictures(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused with their number, or left out and counted where that is allowed."""
    source = own_data(tmp_path)
    for index in range(4):
        (tmp_path / f"{index}.png").unlink()
    if form == "parquet":
        import datasets

        datasets.Dataset.from_list(list(read_jsonl(source))).to_parquet(str(tmp_path / "mine.parquet"))
        source = tmp_path / "mine.parquet"
    command = ["pairs", "--run", str(tmp_path / "run"), "--source", str(source), "--held-out", "0"]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert "record q0: picture " in error and "and so it is with 8 of 12 records" in error and "or pass --allow-missing" in error
    assert cli.main([*command, "--allow-missing"]) == 0
    assert "pairs: 8 of 12 records left out (missing: 8)" in capsys.readouterr().err
    assert read_json(tmp_path / "run/pairs/summary.json")["pairs"] == {"all": 4}
    assert RunConfig.from_yaml(tmp_path / "run/config.yaml").allow_missing


@pytest.mark.parametrize("form", ["jsonl", "dataset"])
def test_own_data_is_split_by_picture(tmp_path: Path, form: str) -> None:
    source = own_data(tmp_path)
    if form == "dataset":
        import datasets

        rows = [{**r, "images": [Image.open(tmp_path / r["images"][0])]} for r in read_jsonl(source)]
        features = datasets.Features(
            {name: datasets.Value("string") for name in ("id", "prompt", "chosen", "rejected")}
            | {"images": datasets.List(datasets.Image())}
        )
        datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "saved"))
        source = tmp_path / "saved"
    config = RunConfig.from_dict(
        {"method": "mdpo", "pairs": {"source": str(source), "held_out": 0.34}, "run_dir": str(tmp_path / "run")}
    )
    context = StageContext(run=RunFolder(tmp_path / "run"), config=config, stage="pairs")
    assert pairs.run(context) == {"layout": "TRL", "pairs": {"all": 8}, "held_out": {"all": 4}}
    sides = [list(read_jsonl(context.folder / f"{name}.jsonl")) for name in ("pairs", "held_out")]
    pictures = [{(context.folder / record["images"][0]).resolve().read_bytes() for record in side} for side in sides]
    assert len(pictures[0]) == 4 and len(pictures[1]) == 2 and not pictures[0] & pictures[1]
    assert {record["id"] for side in sides for record in side} == {f"q{index}" for index in range(12)}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train": {"input": "mine.jsonl"}}, r"train\.input.*pairs\.source"),
        ({"pairs": {"source": "mine.jsonl", "held_out": 0.0}}, r"pairs\.held_out.*nothing is left to evaluate"),
        ({"pairs": {"source": "nowhere.jsonl"}}, r"pairs\.source.*nowhere\.jsonl does not exist"),
        ({"arms": {"a": {"select": {"rule": "perplexity"}}}}, r"arms\.a: 'select' cannot differ"),
        ({"arms": {"mdpo": {"train": {"replay": 0.1}}}}, "name of the main arm"),
    ],
)
def test_what_cannot_be_run_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    own_data(tmp_path)
    with pytest.raises(ConfigError, match=words):
        go(RunConfig.from_dict({"method": "mdpo", "model": "shapes_prior", "run_dir": "run", **values}))
    assert not (tmp_path / "run" / "train").exists()


def test_unfinished_runs(tmp_path: Path) -> None:
    config = RunConfig.from_dict({**SMALL, "run_dir": str(tmp_path / "run")})

    def context(stage: str, **options: Any) -> StageContext:
        return StageContext(run=RunFolder(tmp_path / "run"), config=config, stage=stage, **options)

    with pytest.raises(StageError, match=r"held_out\.jsonl does not exist: run pairs first"):
        evaluate.run(context("evaluate", moment="before"))
    report.run(context("report"))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Nothing has been evaluated yet" in page and "No pairs yet" in page and "No training yet" in page
    pairs.run(context("pairs"))
    report.run(context("report"))
    assert "No pairs yet" not in (tmp_path / "run" / "report.html").read_text()
