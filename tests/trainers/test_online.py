"""Online and mixed DPO: what is drawn and chosen, equal to offline training on the same pairs, continued exactly, in two processes."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from distributed import fill, launch, needs
from online_cases import HashRater, as_trained, kept_lines, online, preference_records, train, weights
from processes import killed
from torch.utils.data import Subset
from training_cases import config, tiny
from transformers import TrainerCallback

from mmdpo_trainers.answers.raters import Rating
from mmdpo_trainers.config.sections.online import OnlineConfig
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.training.online.choice import Answer, choose, choose_negative, is_online, values_of
from mmdpo_trainers.training.online.pairs import OnlinePairs
from mmdpo_trainers.training.online.sampler import as_prompt, evaluating, sample
from mmdpo_trainers.training.trainer import PreferenceTrainer
from mmdpo_trainers.training.training_log import LogFile

STEPS = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
NEGATIVE: dict[str, Any] = {"extra_negative": "sampled", "further_branches": {"sampled": ["images", "sampled"]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llava")


def answers(*texts: str) -> list[Answer]:
    """Answers; those that end in "..." were cut."""
    return [Answer(text.removesuffix("..."), len(text.split()) + 1, not text.endswith("...")) for text in texts]


def test_the_best_answer_is_chosen_against_the_worst() -> None:
    assert choose(answers("a", "b", "c", "d"), [1.0, 3.0, 0.0, 3.0], 0.0) == ("pair", 1, 2)
    assert choose(answers("a", "b"), [1.0, 1.0], 0.0) == ("tie", None, None)
    assert choose(answers("a", "b"), [3.0, 1.5], 2.0) == ("tie", None, None)
    assert choose(answers("a", "b"), [3.0, 1.0], 2.0) == ("pair", 0, 1)
    # One text that a noisy judge rates in two ways is no pair.
    assert choose(answers("a", " a"), [3.0, 1.0], 0.0) == ("tie", None, None)
    assert choose(answers("a", "b"), [3.0, None], 0.0) == ("unrated", None, None)
    # What was cut, or is empty, is rejected and never chosen.
    assert choose(answers("a...", "", "b"), [4.0, 3.0, 1.0], 0.0) == ("tie", None, None)
    assert choose(answers("a...", "b", "c"), [4.0, 2.0, 1.0], 0.0) == ("pair", 1, 2)
    assert choose(answers("a...", "b..."), [4.0, 2.0], 0.0) == ("cut", None, None)
    cut = [*answers("a...", "b"), Answer("<image>", 2, True, usable=False)]
    assert values_of(cut, [4.0, 2.0, 5.0], 1.5) == [2.5, 2.0, None]


def test_an_extra_negative_is_worse_than_the_chosen_response() -> None:
    assert choose_negative(answers("a", "b..."), [1.0, 0.0], "right", 2.0, 0.0) == ("pair", 1)
    assert choose_negative(answers("a", "b"), [2.0, 3.0], "right", 2.0, 0.0) == ("tie", None)
    assert choose_negative(answers("right", "b"), [1.0, 3.0], "right", 2.0, 0.0) == ("tie", None)
    assert choose_negative(answers("a"), [1.0], "right", None, 0.0) == ("unrated", None)


def test_draws_follow_from_seed_step_and_name() -> None:
    drawn = {(seed, step, name) for seed in (0, 1) for step in range(40) for name in "abcde" if is_online(0.5, seed, step, name)}
    assert 160 < len(drawn) < 240
    assert drawn == {place for place in drawn if is_online(0.5, *place)}
    for part in (0, 1, 2):
        assert len({place[part] for place in drawn}) > 1
    assert all(is_online(1.0, 0, step, "a") and not is_online(0.0, 0, step, "a") for step in range(100))


def test_sampling_leaves_nothing_behind(folder: Path) -> None:
    loaded = tiny(folder)
    loaded.model.train()
    loaded.model.base_model.training = False
    loaded.model.config.use_cache = False
    modes, state = [module.training for module in loaded.model.modules()], torch.get_rng_state()
    prompts = [as_prompt(record) for record in preference_records(5)]
    options = OnlineConfig(alpha=1.0, samples=3, max_new_tokens=6, batch_size=2)
    first = sample(loaded, prompts, options, seed=1, step=4)
    assert [len(own) for own in first] == [3] * 5 and len({answer.text for own in first for answer in own}) > 12
    assert [module.training for module in loaded.model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    # A batch's answers do not depend on what else the step asks.
    assert sample(loaded, prompts[2:4], options, seed=1, step=4) == first[2:4]
    assert sample(loaded, prompts[2:4], options, seed=1, step=5) != first[2:4]
    with pytest.raises(KeyError), evaluating(loaded.model):
        assert not any(module.training for module in loaded.model.modules())
        raise KeyError
    assert [module.training for module in loaded.model.modules()] == modes


@pytest.mark.parametrize("case", ["pair", "negative"])
def test_online_training_is_offline_training_on_the_same_pairs(folder: Path, tmp_path: Path, case: str) -> None:
    """The same weights, bit for bit, from what online.jsonl says: the reference is the adapter off."""
    # A rater that knows few ratings makes ties, in whose place the records' own pairs stand.
    pairs = online(HashRater(3), use=case, samples=4 if case == "pair" else 1)
    settings: dict[str, Any] = {"gradient_checkpointing": True, **STEPS, **(NEGATIVE if case == "negative" else {})}
    records = preference_records(12)
    trainer = train(folder, tmp_path / "online", records, pairs, **settings)
    lines = kept_lines(tmp_path / "online")
    assert [line["record"] for line in lines] == [record["id"] for record in records]
    assert {line["trained"] for line in lines} == {"sampled", "offline"}
    offline = as_trained(records, lines, "sampled" if case == "negative" else None)
    again = train(folder, tmp_path / "offline", offline, None, **settings)
    for name, found in weights(trainer).items():
        assert torch.equal(found, weights(again)[name]), name
    for one, other in zip(trainer.state.log_history, again.state.log_history, strict=True):
        assert without_clock(one) == without_clock(other)


def without_clock(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if not name.startswith(("online/", "train_"))}


def test_prompts_alone_and_a_step_of_what_is_left(folder: Path, tmp_path: Path) -> None:
    """Records without a pair of their own; those that give none are left out, a whole micro-batch too, and the rest is the step's mean."""
    records = [{k: v for k, v in record.items() if k not in ("chosen", "rejected")} for record in preference_records(12)]
    steps = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 6}
    trainer = train(folder, tmp_path / "online", records, online(HashRater(2)), **steps)
    lines = kept_lines(tmp_path / "online")
    trained = [line["trained"] for line in lines]
    assert set(trained) == {"sampled", "skipped"} and ["skipped"] * 2 in [trained[at : at + 2] for at in range(0, 12, 2)]
    offline = as_trained(records, lines)
    steps = {"max_steps": 1, "per_device_train_batch_size": len(offline)}
    again = train(folder, tmp_path / "offline", offline, None, **steps)
    for name, found in weights(trainer).items():
        assert torch.allclose(found, weights(again)[name], rtol=1e-6, atol=1e-9), name
    entry, plain = trainer.state.log_history[0], again.state.log_history[0]
    assert entry["loss"] == pytest.approx(plain["loss"], rel=1e-9)
    assert entry["online/skipped"] == pytest.approx(trained.count("skipped") / 12) and entry["online/share"] == 1.0
    ties, cut = ([line["outcome"] for line in lines].count(word) / 12 for word in ("tie", "cut"))
    assert (entry["online/ties"], entry["online/cut"], entry["online/unrated"]) == pytest.approx((ties, cut, 0.0))


def test_mixed_training_draws_each_record_anew(folder: Path, tmp_path: Path) -> None:
    records, steps = preference_records(8), {"max_steps": 4, "per_device_train_batch_size": 4}
    plain = weights(train(folder, tmp_path / "plain", records, None, **steps))
    off = weights(train(folder, tmp_path / "off", records, online(alpha=0.0), **steps))
    assert all(torch.equal(plain[name], found) for name, found in off.items()) and kept_lines(tmp_path / "off") == []
    train(folder, tmp_path / "half", records, online(alpha=0.5), seed=3, **steps)
    drawn = {(line["step"], line["record"]) for line in kept_lines(tmp_path / "half")}
    shown = [(step, f"record-{index}") for step in (1, 2, 3, 4) for index in range(8) if index // 4 == (step - 1) % 2]
    assert drawn == {(step, name) for step, name in shown if is_online(0.5, 3, step, name)}
    # The second epoch draws anew.
    by_epoch = [{name for step, name in drawn if step in steps} for steps in ((1, 2), (3, 4))]
    assert by_epoch[0] != by_epoch[1] and 4 < len(drawn) < 12


class KillAfter(TrainerCallback):
    """Kills the process when the step's answers are kept and before its weights are saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, output: Path, kill_after: int | None = None) -> dict[str, torch.Tensor]:
    """Two epochs of mixed training in a random order, a checkpoint every two steps."""
    torch.set_num_threads(1)
    loaded = tiny(folder, torch.float32)
    settings = config(
        output,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        logging_steps=3,
    )
    trainer = PreferenceTrainer(
        loaded.model,
        settings,
        processing_class=loaded.processor,
        train_dataset=preference_records(12),
        online=online(alpha=0.7, temperature=1.2),
        callbacks=[LogFile(output / "log.jsonl"), *([] if kill_after is None else [KillAfter(kill_after)])],
    )
    trainer.train(resume_from_checkpoint="auto")
    torch.save(weights(trainer), output / "weights.pt")
    return weights(trainer)


def test_a_killed_training_ends_alike(folder: Path, tmp_path: Path) -> None:
    expected = run(folder, tmp_path / "whole")
    for step in (3, 5):
        killed(partial(run, folder, tmp_path / "killed", step))
        assert kept_lines(tmp_path / "killed")[-1]["step"] == step
    # A line that was torn by the kill.
    with (tmp_path / "killed" / "online.jsonl").open("a") as file:
        file.write('{"id": "6/rec')
    found = run(folder, tmp_path / "killed")
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    for file in ("online.jsonl", "log.jsonl"):
        assert (tmp_path / "killed" / file).read_text() == (tmp_path / "whole" / file).read_text()


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_two_processes_sample_for_their_own_records(tmp_path: Path, strategy: str) -> None:
    """As one process does, which has all records: answers, pairs, weights. One prompt at a time, so that none is padded for another."""
    needs(strategy)
    folder = fill(tmp_path / "models")
    case = {"online": {"alpha": 0.6, "samples": 8, "max_new_tokens": 40, "batch_size": 1}, "accumulation": 4}
    launch("alone", folder, tmp_path / "alone", {"mixed": case})
    launch(strategy, folder, tmp_path / strategy, {"mixed": case})
    one, two = (kept_lines(tmp_path / name / "mixed") for name in ("alone", strategy))
    assert one == two and {line["trained"] for line in one} == {"sampled", "offline"}
    first, second = (
        safetensors.torch.load_file(tmp_path / name / "mixed" / "final" / "adapter_model.safetensors")
        for name in ("alone", strategy)
    )
    for name, found in first.items():
        assert torch.allclose(found, second[name], rtol=1e-4, atol=1e-7), name


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    records = preference_records(4)
    prompts = [{k: v for k, v in record.items() if k not in ("chosen", "rejected")} for record in records]
    for options, settings, data, words in [
        ({}, {"max_tokens_per_batch": 400}, records, "max_tokens_per_batch: with online answers the lengths"),
        ({}, {"precompute_ref_log_probs": True}, records, "precompute_ref_log_probs: with online answers the reference"),
        ({}, {"no_image": True}, records, "no_image"),
        ({"use": "negative"}, {}, records, "set extra_negative: sampled"),
        ({"alpha": 0.5}, {}, prompts, "need online.alpha 1"),
        ({}, {"max_length": 100}, prompts, "max_length: prompts alone"),
    ]:
        with pytest.raises(ValueError, match=words):
            train(folder, tmp_path, data, online(**options), **settings)
    for wrong, words in [
        ({"alpha": None}, "alpha"),
        ({"samples": 1}, "samples: expected 2"),
        ({"attribute": "x"}, "overall, got 'x'"),
    ]:
        with pytest.raises(ValueError, match=words):
            OnlinePairs(OnlineConfig(**{"alpha": 1.0, **wrong}), HashRater())
    with pytest.raises(DataError, match="record-1: it has no chosen"):
        train(folder, tmp_path, Subset([records[0], prompts[1]], [0, 1]), online(alpha=0.0))
    with pytest.raises(ValueError, match="eval_dataset: prompts without"):
        online().evaluated({"mine": prompts}, config(tmp_path))
    shards: Any = SimpleNamespace(sharding=SimpleNamespace(in_shards=True))
    with pytest.raises(ValueError, match="weights in shards"):
        online().bind(shards)
    silent = HashRater()
    silent._rating = lambda record, text: Rating(None, "the judge sleeps")  # type: ignore[method-assign]
    with pytest.raises(DataError, match="the judge sleeps"):
        train(folder, tmp_path, records, online(silent))
