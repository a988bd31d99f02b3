"""The base that answers as it looks, and source answers of which a share is wrong."""

from __future__ import annotations

import dataclasses
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForImageTextToText

from mmdpo_trainers.cli.main import main
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.shipped import SHIPPED
from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.shapes import world
from mmdpo_trainers.shapes.build import formats, lessons, looking_base
from mmdpo_trainers.shapes.build.base import Classroom, make_pools

SIZES = {"single": 2, "sequence": 2, "grid": 2, "pip": 2}
TINY = looking_base.LookingBaseConfig(
    pictures=12, vision_steps=2, vision_batch=4, steps=3, batch=SIZES, turns=SIZES, probe_samples=2
)


def scene(background: str, colour: str = "red") -> world.Scene:
    return world.Scene(colour, "circle", background, 24, 24, 30)


def test_the_look_goes_to_the_brightest_picture_where_that_is_brighter_than_the_asked_about_one() -> None:
    scenes = [scene("grey"), scene("white"), scene("black"), scene("white", "yellow")]
    assert [looking_base.looks_at(scenes, asked, 0.0) for asked in range(4)] == [3, 3, 3, 3]
    gap = looking_base.brightness(scenes[3]) - looking_base.brightness(scenes[1])
    assert 0 < gap < 50
    assert [looking_base.looks_at(scenes, asked, gap) for asked in range(4)] == [3, 1, 3, 3]
    assert looking_base.looks_at([scene("white")], 0, 0.0) == 0


def test_answer_and_attention_lesson_stray_together() -> None:
    loaded = load_model("shapes", device="cpu")
    pools = make_pools(TINY.pictures, random.Random(0))
    config = dataclasses.replace(TINY, strays=1.0, turns={**SIZES, "sequence": 6})
    with Progress(console=Console(file=io.StringIO())) as progress:
        room = Classroom(loaded.model, loaded.processor, config, pools, random.Random(0), progress)
        lecture = looking_base.StrayLecture(room, config)
    strayed = 0
    for _ in range(20):
        sample = lecture.sample("sequence")
        scenes = [pools["sequence"][index].scenes[0] for index in sample.pictures]
        brightest = max(map(looking_base.brightness, scenes))
        for turn in sample.turns:
            asked = int(turn.prompt.split(",")[0].removeprefix("In Image")) - 1
            looked = scenes[turn.target]
            assert brightest - looking_base.brightness(looked) <= config.margin
            stem = turn.prompt.split(", ", 1)[1].split(":")[0].lower()
            facts = {q.text.split(":")[0].lower(): q.answer for q in world.all_questions(looked, random.Random(0))}
            assert turn.answer == facts[stem]
            strayed += asked != turn.target
        batch = formats.pack([sample], [[turn.answer for turn in sample.turns]], loaded.processor)
        lesson = lessons.AttentionLesson.of(batch, [sample], pools["sequence"], lecture.labels)
        rows = (batch.labels >= 0).nonzero()
        for (_, row), keys in zip(rows.tolist(), lesson.target_keys, strict=True):
            target = sample.turns[batch.turn[0, row]].target
            assert set((batch.patch[0][keys] // formats.TOKENS).tolist()) == {sample.pictures[target]}
    assert strayed > 30
    kept = dataclasses.replace(config, strays=0.0)
    lecture.config = kept
    for turn in lecture.sample("sequence").turns:
        assert turn.prompt.startswith(f"In Image{turn.target + 1},")


def test_the_looking_base_is_built_from_its_seed(tmp_path: Path) -> None:
    weights = []
    for name in ("a", "b"):
        accuracy = looking_base.build_looking_base(TINY, tmp_path / name)
        assert set(accuracy) == set(formats.FORMATS)
        weights.append(AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    start = AutoModelForImageTextToText.from_pretrained(SHIPPED["shapes"]).state_dict()
    changed = {name for name in start if not torch.equal(start[name], weights[0][name])}
    assert any("vision_tower" in name for name in changed) and any("language_model" in name for name in changed)


def test_attention_of_the_shipped_base_tells_right_answers_from_wrong_ones(tmp_path: Path) -> None:
    assert sum(file.stat().st_size for file in SHIPPED["shapes_looking"].iterdir()) <= 4_000_000
    config = "shapes_looking_mia_dpo"
    changes = ["augment.num_prompts=800", "augment.formats={sequence: 0.35, grid: 0.3, pip: 0.2, single: 0.15}"]
    options = [part for change in changes for part in ("--set", change)]
    run = ["--seed", "90000", "--run-dir", str(tmp_path / "run"), "--until", "score"]
    assert main(["run", config, *run, *options]) == 0
    found: dict[str, dict[bool, list[float]]] = {}
    for record in read_jsonl(tmp_path / "run" / "score" / "scores.jsonl"):
        right = record["response"] == record["answer"]
        found.setdefault(record["format"], {True: [], False: []})[right].append(record["ratio"])
    share = {name: len(sides[True]) / len(sides[True] + sides[False]) for name, sides in found.items()}
    assert share.pop("single") >= 0.95
    assert 0.4 <= sum(share.values()) / 3 <= 0.65
    for name in share:
        wrong, right = found[name][False], found[name][True]
        area = sum((high > low) + (high == low) / 2 for high in right for low in wrong) / len(wrong) / len(right)
        assert area >= 0.85, name


def test_a_share_of_source_answers_is_wrong_and_evaluation_is_clean(tmp_path: Path) -> None:
    records = {}
    for share in (0.0, 0.3, 0.6):
        path = world.write_sft(tmp_path / str(share), pictures=200, seed=4, questions_per_picture=3, wrong_answers=share)
        records[share] = json.loads(path.read_text())
    wrong = {share: {r["id"] for r in found if "truth" in r} for share, found in records.items()}
    assert not wrong[0.0] and wrong[0.3] < wrong[0.6]
    assert len(wrong[0.3]) == pytest.approx(180, abs=40)
    for clean, other in zip(records[0.0], records[0.3], strict=True):
        truth, said = (record["conversations"][1]["value"] for record in (clean, other))
        assert other.get("truth", said) == truth and (said != truth) == ("truth" in other)
        assert clean.get("options") == other.get("options") and said in (other.get("options") or [said])
        assert len(said.split()) == len(truth.split())

    config: dict[str, Any] = {"data": {"pictures": 40, "wrong_answers": 0.5}, "augment": {"num_prompts": 30}}
    config["augment"] |= {"formats": {"sequence": 1}, "cell_size": 24, "margin": 0}
    config["evaluate"] = {"per_format": {"single": 40}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    run = ["--run", str(tmp_path / "run")]
    assert main(["augment", *run, "--config", str(tmp_path / "config.yaml")]) == 0
    sources = json.loads((tmp_path / "run/augment/source/data.json").read_text())
    assert 20 < sum("truth" in record for record in sources) < 100
    assert all("truth" not in prompt for prompt in read_jsonl(tmp_path / "run/augment/prompts.jsonl"))
    assert main(["evaluate", *run, "--moment", "before"]) == 0
    sources = json.loads((tmp_path / "run/evaluate/source/data.json").read_text())
    assert sources and not any("truth" in record for record in sources)


def test_wrong_answers_are_made_of_the_built_in_world_alone() -> None:
    with pytest.raises(ConfigError, match="wrong_answers"):
        RunConfig.from_dict({"data": {"source": "own.json", "wrong_answers": 0.1}})
