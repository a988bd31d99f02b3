"""A reward model that rates: n answers in one tree, problems by record, what it was trained to read, and figures of its rewards."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_qwen
from training_cases import preference_records, tiny, warm_adapter

from mmdpo_trainers.answers.raters import Surroundings
from mmdpo_trainers.config.sections.rating import RateConfig
from mmdpo_trainers.errors import ConfigError, DataError, StageError
from mmdpo_trainers.methods.reward_figures import calibration, histogram, reward_figures
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.training.reward.config import RewardConfig
from mmdpo_trainers.training.reward.inputs import FILE, RewardInputs
from mmdpo_trainers.training.reward.model import EMPTY, RewardModel
from mmdpo_trainers.training.reward.rater import rater_of
from mmdpo_trainers.training.reward.score_head import HEAD
from mmdpo_trainers.training.reward.trainer import RewardTrainer

ANSWERS = (["red circle", "blue", "red circle", "the green square on top"], ["yes"], ["two", "", "three cat dog"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Prompt records as stages have them: pictures as files, the truth beside them."""
    folder = tmp_path_factory.mktemp("pictures")
    found = []
    for record in preference_records(3):
        images = []
        for picture in record["images"]:
            images.append(str(folder / f"{record['id']}-{len(images)}.png"))
            picture.save(images[-1])
        prompt = record["prompt"][0]["content"]
        found.append({"id": record["id"], "images": images, "prompt": prompt, "answer": "red circle", "options": ["red", "blue"]})
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reward model that is told the truth and what there is to choose from."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("reward")
    loaded = tiny(folder / "base", torch.float32)
    records = [{**record, "answer": "red circle", "options": ["red", "blue"]} for record in preference_records(4)]
    args = RewardConfig(str(folder / "out"), facts=["options", "answer"], lora_r=4, use_cpu=True, disable_tqdm=True, max_steps=1)
    trainer = RewardTrainer(loaded.model, args, processing_class=loaded.processor, train_dataset=records)
    warm_adapter(trainer)
    trainer.save_model(str(folder / "final"))
    return folder / "final"


def rater(trained: Path, **options: Any) -> Any:
    given = {"source": "reward_model", "judge": str(trained), "facts": ["answer", "options"], **options}
    return rater_of(RateConfig(**given), Surroundings(folder=trained.parent, device="cpu"))


def test_any_number_of_answers_is_rated_as_each_alone(trained: Path, data: list[dict[str, Any]]) -> None:
    found = rater(trained).rate(data, ANSWERS)
    assert [[each.problem for each in ratings] for ratings in found] == [[None] * 4, [None], [None, EMPTY, None]]
    values = [[each.value("reward") for each in ratings] for ratings in found]
    assert values[0][0] == values[0][2] and len({value for row in values for value in row}) == 7
    model = RewardModel.load(trained, dtype="float64", device="cpu")
    for record, texts, row in zip(data, ANSWERS, values, strict=True):
        for text, value in zip(texts, row, strict=True):
            assert (value is None) == (text == "")
            if value is not None:
                assert value == pytest.approx(model.rewards([record], [[text]])[0][0], abs=1e-5)


def test_padded_rows_give_what_trees_give(trained: Path, data: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    tree = RewardModel.load(trained, dtype="float64", device="cpu").rewards(data, ANSWERS)
    monkeypatch.setattr("mmdpo_trainers.training.reward.model.tree_refusal", lambda model: "a reason")
    padded = RewardModel.load(trained, dtype="float64", device="cpu")
    assert not padded._collator(2).tree_packing
    for row, other in zip(padded.rewards(data, ANSWERS), tree, strict=True):
        # transformers' norms round to float32.
        assert row == pytest.approx(other, abs=1e-6)


def test_an_answer_in_a_prompt_record_is_a_fact_and_no_response(trained: Path, data: list[dict[str, Any]]) -> None:
    """The truth that the model is told changes the reward; columns that it is not told do not."""
    model = RewardModel.load(trained, device="cpu")
    other = {**data[0], "answer": "blue"}
    plain, told, untold = (
        model.rewards([record], [["blue"]])[0][0] for record in (data[0], other, {**data[0], "caption": "a star"})
    )
    assert plain != told and plain == untold


def test_what_cannot_be_rated_is_told_by_record(trained: Path, data: list[dict[str, Any]]) -> None:
    gone = {**data[1], "id": "gone", "images": ["none.png"] * len(data[1]["images"])}
    found = rater(trained).rate([data[0], gone, data[2]], [["red", "a</s>b"], ["red"], [" "]])
    assert found[0][0].problem is None and found[0][0].scores is not None
    assert "response" in found[0][1].problem or "holds '</s>'" in found[0][1].problem
    assert "record gone" in found[1][0].problem and found[1][0].scores is None
    assert found[2][0].problem == EMPTY
    assert [each.reason for ratings in found for each in ratings] == [None, "unfit", "unfit", "empty"]
    assert rater(trained).rate([], []) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge": None}, "rate.judge: expected a path with rate.source: reward_model, got none"),
        ({"judge": "nowhere"}, "rate.judge: nowhere does not exist"),
        ({"facts": []}, r"rate.facts: expected \[options, answer\], which the reward model .* was trained to read, got \[\]"),
        (
            {"facts": ["answer", "caption"]},
            r"rate.facts: expected \[options, answer\].* got \[answer, caption\]; set rate.facts so",
        ),
        ({"images": False}, "rate.images: the reward model .* was trained with pictures, got False; set it so"),
    ],
)
def test_settings_that_the_model_was_not_trained_with(trained: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rater(trained, **options)


def test_other_sources_are_rated_as_ever(trained: Path, data: list[dict[str, Any]]) -> None:
    exact = rater(trained, source="exact")
    assert exact.rate(data[:1], [["red circle"]])[0][0].value() == 4.0 and exact.attributes[0] == "helpfulness"


def test_folders_that_hold_no_reward_model(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=f"is no reward model: there is no {FILE}"):
        RewardModel.load(tmp_path)
    for name in (FILE, "adapter_config.json"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    with pytest.raises(StageError, match=r"reward model .* does not fit"):
        RewardModel.load(tmp_path, device="cpu")
    adapter = json.loads((trained / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**adapter, "base_model_name_or_path": "/nowhere"}))
    with pytest.raises(StageError, match="the model that it was trained on, /nowhere, is not a folder here"):
        RewardModel.load(tmp_path)
    (tmp_path / FILE).write_text('{"facts": ["truth"], "template": "{{ prompt }}", "no_image": false}')
    with pytest.raises(StageError, match=r"cannot be read \(facts: expected some of answer, caption, options"):
        RewardModel.load(tmp_path)


def test_an_untrained_head_follows_from_the_seed(tmp_path: Path, data: list[dict[str, Any]]) -> None:
    """With M-RoPE's positions; a family whose processor is another."""
    folder = make_tiny_qwen(tmp_path / "qwen")
    one, same, other = (
        RewardModel.untrained(load_model(folder, dtype="float32", device="cpu"), RewardInputs(), seed=seed) for seed in (3, 3, 4)
    )
    rewards = [model.rewards(data, ANSWERS) for model in (one, same, other)]
    assert rewards[0] == rewards[1] != rewards[2]
    head = getattr(one.loaded.model, HEAD)
    assert head.weight.dtype == torch.float32 and head.bias is None
    half = RewardModel.untrained(load_model(folder, dtype="bfloat16", device="cpu"), RewardInputs(), seed=3)
    assert getattr(half.loaded.model, HEAD).weight.dtype == torch.float32


def test_facts_are_written_into_the_prompt() -> None:
    record = {
        "id": "a",
        "images": ["a.png"],
        "prompt": "<image>\nWhich?",
        "answer": "red",
        "options": ["red", "blue"],
        "caption": "",
    }
    every = RewardInputs(facts=("answer", "caption", "options"))
    assert every.prompt_of(record).stored() == "<image>\nWhich?\n\nOptions: red, blue\n\nCorrect answer: red"
    assert RewardInputs().prompt_of(record).stored() == "<image>\nWhich?"
    own = RewardInputs(facts=("answer",), template="{{ answer }}! {{ prompt }}")
    assert own.prompt_of(record).stored() == "red! <image>\nWhich?"
    assert every.known([record, {**record, "caption": ["a", "b"]}]) == {"answer": 2, "caption": 1, "options": 2}
    with pytest.raises(DataError, match="record a: caption: expected a text, or a list of them, got"):
        every.prompt_of({**record, "caption": {"text": "a"}})
    with pytest.raises(DataError, match="record a: facts_template: "):
        RewardInputs(facts=("answer",), template="{{ prompt }}{% if answer == 'red' %}{{ colour.name }}{% endif %}").prompt_of(
            record
        )
    # A template that comes with somebody's model gets at nothing but these.
    with pytest.raises(ValueError, match="facts_template: .* access to attribute '__class__' of 'str' object is unsafe"):
        RewardInputs(facts=("answer",), template="{{ prompt }}{{ answer.__class__.mro() }}")


def test_figures_of_rewards() -> None:
    pairs = [("a", 1.0, 0.0), ("a", 0.0, 2.0), ("b", 1.0, 1.0), (None, 5.0, 1.0)]
    records = [{"group": group, "rewards": {"chosen": chosen, "rejected": rejected}} for group, chosen, rejected in pairs]
    found = reward_figures(records)
    assert list(found) == ["a", "b", "all"]
    # The same reward for both ranks nothing.
    assert (found["all"]["right"], found["all"]["pairs"], found["b"]["right"]) == (2, 4, 0)
    assert found["a"]["margin"] == -0.5 and found["a"]["rewards"] == {"chosen": 0.5, "rejected": 1.0}
    assert found["b"]["loss"] == pytest.approx(math.log(2))
    assert found["a"]["loss"] == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(2))) / 2)
    bins = calibration([1.0, -2.0, 0.0, 4.0, 40.0])
    assert [(each["low"], each["pairs"], each["right"]) for each in bins] == [
        (0.5, 1, 0),
        (pytest.approx(0.7), 1, 1),
        (pytest.approx(0.8), 1, 0),
        (pytest.approx(0.9), 2, 2),
    ]
    assert bins[1]["predicted"] == pytest.approx(1 / (1 + math.exp(-1)))
    bars = histogram([1.0, -2.0, 2.0, 0.05])
    assert bars["edges"][0] == -2.0 and bars["edges"][-1] == 2.0 and 0.0 in bars["edges"]
    assert sum(bars["counts"]) == 4 and bars["counts"][0] == 1 and bars["counts"][-1] == 1 and bars["counts"][10] == 1
    assert sum(histogram([0.0, 0.0])["counts"]) == 2
