"""What a trainer is given as model, reference, processor and data: taken as it is, read by its name, or refused in one sentence."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny_models import TINY, make_tiny_llava
from training_cases import Gradients, config, preference_records, tiny
from transformers import AutoModel

from mmdpo_trainers.errors import DataError, StageError
from mmdpo_trainers.training.trainer import PreferenceTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    tiny(found)
    return found


def test_a_model_and_its_reference_by_their_folder(folder: Path, tmp_path: Path) -> None:
    """The processor is that of the folder, as with TRL."""
    by_name = PreferenceTrainer(str(folder), config(tmp_path), train_dataset=preference_records(4))
    loaded = tiny(folder, torch.float32)
    given = PreferenceTrainer(
        loaded.model, config(tmp_path), processing_class=loaded.processor, train_dataset=preference_records(4)
    )
    assert type(by_name.processing_class) is type(loaded.processor)
    for trainer in (by_name, given):
        trainer.train()
    assert by_name.state.log_history[0]["logps/chosen"] == pytest.approx(given.state.log_history[0]["logps/chosen"], rel=1e-5)
    second = PreferenceTrainer(tiny(folder).model, config(tmp_path), processing_class=str(folder), ref_model=str(folder))
    assert second.ref_model is not None and second.ref_model.dtype == torch.float32


def test_what_is_no_model_or_processor(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny(folder, torch.float32)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    nameless = tiny(folder, torch.float32).model
    nameless.config._name_or_path = ""
    for options, error, message in (
        ({"model": loaded}, ValueError, "model: expected a model, got what load_model gives; pass its `model`"),
        ({"model": torch.nn.Linear(1, 1)}, ValueError, "model: expected a transformers model, .* got Linear"),
        ({"model": None}, ValueError, "model: expected a transformers model, .* got NoneType"),
        ({"model": AutoModel.from_pretrained(folder)}, ValueError, "model: expected a model with an output head, got LlavaModel"),
        ({"model": "no/such-model"}, StageError, "model: 'no/such-model' is no folder here, and the Hub does not give it"),
        ({"ref_model": "no/such-model"}, StageError, "ref_model: 'no/such-model' is no folder here"),
        ({"ref_model": loaded.processor}, ValueError, "ref_model: expected a transformers model"),
        (
            {"processing_class": loaded.processor.tokenizer},
            ValueError,
            "processing_class: expected a processor for text and pictures",
        ),
        ({"model": nameless, "processing_class": None}, ValueError, "processing_class: the model does not say which folder"),
        ({"peft_config": {"r": 4}}, ValueError, "peft_config: expected one of PEFT's configurations, .* got dict"),
        ({"compute_metrics": print}, ValueError, "compute_metrics: .*evaluation's log"),
    ):
        arguments: dict[str, Any] = {"model": loaded.model, "processing_class": loaded.processor, **options}
        with pytest.raises(error, match=message):
            PreferenceTrainer(arguments.pop("model"), config(tmp_path), **arguments)


def test_a_reference_of_another_kind_is_refused(folder: Path, tmp_path: Path) -> None:
    loaded = tiny(folder, torch.float32)
    TINY["qwen2_5_vl"](tmp_path / "qwen")
    make_tiny_llava(tmp_path / "finer", patch=4)
    fewer = tiny(folder, torch.float32).model
    fewer.resize_token_embeddings(20)
    for reference, message in (
        (str(tmp_path / "qwen"), "ref_model: expected a model of family llava with image token .*, got qwen2_5_vl"),
        (fewer, "ref_model: expected a vocabulary of .* tokens, as the policy's, got 20"),
        (str(tmp_path / "finer"), "ref_model: it cannot take what the policy's processor makes of a picture"),
    ):
        with pytest.raises(ValueError, match=message):
            PreferenceTrainer(loaded.model, config(tmp_path), processing_class=loaded.processor, ref_model=reference)


def test_full_training_on_what_an_earlier_trainer_trained(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = tiny(folder, torch.float32)
    for times in (0, 1):
        with caplog.at_level(logging.WARNING, logger="mmdpo_trainers"):
            PreferenceTrainer(loaded.model, config(tmp_path, full_finetune=True), processing_class=loaded.processor)
        assert caplog.text.count("model: an earlier trainer had it too") == times


@pytest.mark.parametrize("limit", [None, 60])
def test_streaming_data_train_as_those_at_hand(folder: Path, tmp_path: Path, limit: int | None) -> None:
    """The same steps, evaluation included, in the order of the stream; records that are too long are left out as they come by."""
    records = preference_records(6)
    stream = datasets.IterableDataset.from_generator(lambda: iter(records))
    found = []
    for train, evaluation in ((records, records[:3]), (stream, {"held": stream.take(3)})):
        loaded, gradients = tiny(folder), Gradients()
        settings = config(
            tmp_path, max_steps=2, per_device_train_batch_size=2, train_sampling_strategy="sequential", max_length=limit
        )
        trainer = PreferenceTrainer(
            loaded.model,
            settings,
            processing_class=loaded.processor,
            train_dataset=train,
            eval_dataset=evaluation,
            callbacks=[gradients],
        )
        trainer.train()
        held = trainer.eval_dataset["held"] if isinstance(evaluation, dict) else None
        found.append((gradients.steps, trainer.evaluate(held)["eval_loss"], set(trainer.left_out)))
    (steps, loss, left_out), (streamed, streamed_loss, streamed_out) = found
    assert streamed_loss == pytest.approx(loss, rel=1e-9)
    assert left_out == streamed_out and bool(left_out) == (limit is not None)
    assert len(steps) == len(streamed) == 2
    for mine, theirs in zip(steps, streamed, strict=True):
        for name, gradient in mine.items():
            torch.testing.assert_close(theirs[name], gradient, rtol=1e-9, atol=1e-12)


def test_data_that_cannot_be_trained_on(folder: Path, tmp_path: Path) -> None:
    records = preference_records(2)
    table = datasets.Dataset.from_list([{"prompt": "is it ?", "chosen": "yes", "rejected": "no", "tools": ["look"]}])
    stream = datasets.IterableDataset.from_generator(lambda: iter(records))
    for options, settings, message in (
        (
            {"train_dataset": {"train": records, "test": records}},
            {},
            "train_dataset: expected one dataset, got dict of train, test",
        ),
        ({"train_dataset": datasets.DatasetDict(test=table)}, {}, r"got DatasetDict of test; pass one, as in dataset\['test'\]"),
        ({"eval_dataset": {"a": {"b": records}}}, {}, r"eval_dataset\['a'\]: expected one dataset"),
        ({"train_dataset": "pairs.jsonl"}, {}, "train_dataset: expected a datasets.Dataset, .* got str; read files with"),
        (
            {"train_dataset": iter(records)},
            {},
            "train_dataset: expected a datasets.Dataset, an IterableDataset or a list of records",
        ),
        (
            {"train_dataset": table},
            {},
            "record .*: column 'tools' must be a list of JSON schemas of functions, got .*look",
        ),
        (
            {"train_dataset": [{**records[0], "chat_template_kwargs": {"tokenize": 1}}]},
            {},
            "column 'chat_template_kwargs' holds 'tokenize', which is no argument of a chat template's own",
        ),
        (
            {"train_dataset": [{**records[0], "ref_chosen_logps": -1.0}]},
            {},
            "'ref_chosen_logps' is not read.* keeps the reference's",
        ),
        ({"train_dataset": stream}, {"max_steps": -1}, "max_steps: streaming data .* expected 1 or more, got -1"),
        ({"train_dataset": stream}, {"precompute_ref_log_probs": True}, "precompute_ref_log_probs needs all records at hand"),
        ({"eval_dataset": stream}, {"max_tokens_per_batch": 99}, "eval_dataset: max_tokens_per_batch needs all records at hand"),
        ({"train_dataset": stream}, {"group_by_pictures": True}, "group_by_pictures needs all records at hand"),
        (
            {"train_dataset": stream},
            {"corruption": "other", "loss_type": ["copo"]},
            "corruption 'other' needs all records at hand",
        ),
    ):
        loaded = tiny(folder, torch.float32)
        with pytest.raises(ValueError, match=message):
            PreferenceTrainer(loaded.model, config(tmp_path, **settings), processing_class=loaded.processor, **options)


def test_a_streamed_record_that_is_too_long_stops_where_that_is_asked_for(folder: Path, tmp_path: Path) -> None:
    records = preference_records(6)
    stream = datasets.IterableDataset.from_generator(lambda: iter(records))
    trainer = PreferenceTrainer(str(folder), config(tmp_path, max_length=60, too_long="error", max_steps=2), train_dataset=stream)
    with pytest.raises(DataError, match="record record-2: .* tokens are more than max_length=60"):
        trainer.train()
