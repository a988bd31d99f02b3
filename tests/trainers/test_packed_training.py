"""Training on packed batches: the same loss as unpacked, and bit-for-bit continuation with batches prepared in another process."""

from __future__ import annotations

import pickle
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import killed
from test_resume import KillAfter, assert_same, outcome
from tiny_models import sample_pictures
from training_cases import config, preference_records, tiny
from transformers import PreTrainedTokenizerFast

from mmdpo_trainers.errors import DataError
from mmdpo_trainers.models import token_rules
from mmdpo_trainers.models.token_rules import TextEncoder
from mmdpo_trainers.processes.progress import Progress
from mmdpo_trainers.training.batches.collator import PreferenceCollator
from mmdpo_trainers.training.batches.packing import batch_sampler, batch_tokens, measure, pack_by_tokens
from mmdpo_trainers.training.trainer import PreferenceTrainer
from mmdpo_trainers.training.training_log import LogFile

MDPO = ["sigmoid", "copo", "ancpo"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


def questions(sets: int, each: int) -> list[dict[str, Any]]:
    """`each` questions on each of `sets` lists of pictures."""
    pictures = sample_pictures(sets + 3)
    records = []
    for number in range(sets * each):
        which = number % sets
        record = preference_records(3, pictures[which : which + 3] * 2)[which % 3]
        text = record["prompt"][0]["content"] + " ?" * (number // sets)
        records.append({**record, "id": f"record-{number}", "prompt": [{"role": "user", "content": text}]})
    return records


def trainer(model: Path, output: Path, records: list[dict[str, Any]], **options: Any) -> PreferenceTrainer:
    torch.set_num_threads(1)
    loaded = tiny(model, torch.float32)
    callbacks = options.pop("callbacks", None)
    return PreferenceTrainer(
        loaded.model,
        config(output, **options),
        processing_class=loaded.processor,
        train_dataset=records,
        callbacks=callbacks,
        progress=Progress(every=1e9),
    )


@pytest.mark.parametrize("losses", [["sigmoid"], MDPO])
def test_no_batch_holds_more_tokens_than_packing_counts(model: Path, tmp_path: Path, losses: list[str]) -> None:
    records = questions(5, 4)
    collator = trainer(model, tmp_path, records, loss_type=losses).data_collator
    sizes = measure(records, collator, range(len(records)))
    assert len(set(sizes.groups)) == 5
    together = apart = 0
    for batch in pack_by_tokens(sizes.lengths, 260, groups=sizes.groups, shared=sizes.shared):
        tokens = collator([records[index] for index in batch])["batch"].input_ids.shape[1]
        assert tokens <= batch_tokens(batch, sizes.lengths, sizes.groups, sizes.shared) <= 260
        together += tokens
        apart += sum(collator([records[index]])["batch"].input_ids.shape[1] for index in batch)
    assert apart == sum(sizes.lengths)
    assert together < (0.5 if losses != MDPO else 0.75) * apart


def test_pictures_are_told_apart_only_where_records_are_grouped(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = questions(5, 4)
    monkeypatch.setattr(PreferenceCollator, "image_key", lambda self, record: pytest.fail("a picture was decoded"))
    packed = trainer(model, tmp_path, records, max_tokens_per_batch=260)
    names = sorted(name for batch in packed.get_train_dataloader() for name in batch["batch"].ids)
    assert names == sorted(record["id"] for record in records)


def test_the_dataloader_packs_and_says_what_it_saves(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = questions(5, 4)
    packed = trainer(model, tmp_path, records, max_tokens_per_batch=260, group_by_pictures=True)
    seen = [batch["batch"] for batch in packed.get_train_dataloader()]
    assert sorted(name for batch in seen for name in batch.ids) == sorted(record["id"] for record in records)
    assert max(batch.input_ids.shape[1] for batch in seen) <= 260
    assert "train: 20 records about 5 sets of pictures in" in capsys.readouterr().err
    grouped = trainer(model, tmp_path, records, per_device_train_batch_size=4, group_by_pictures=True)
    for inputs in grouped.get_train_dataloader():
        batch = inputs["batch"]
        assert len(batch.ids) == 4 and len({int(name.split("-")[1]) % 5 for name in batch.ids}) == 1


def test_a_text_becomes_tokens_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over `max_length`, packing, the look-up of the reference and two epochs."""
    records = questions(4, 3)
    calls: Counter[tuple[str, Any]] = Counter()
    call = PreTrainedTokenizerFast.__call__

    def counted(self: Any, text: Any, **options: Any) -> Any:
        if isinstance(text, str) and text != "<image>":
            calls[text, options.get("add_special_tokens")] += 1
        return call(self, text, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counted)
    options: dict[str, Any] = {"max_length": 500, "max_tokens_per_batch": 300, "group_by_pictures": True}
    made = trainer(model, tmp_path, records, max_steps=-1, num_train_epochs=2, precompute_ref_log_probs=True, **options)
    made.train()
    assert made.state.epoch == 2 and made.reference.cache is not None and len(made.reference.cache) == len(records)
    asked = {record["prompt"][0]["content"].rsplit("\n", 1)[-1] for record in records}
    answers = {record[column][0]["content"] for record in records for column in ("chosen", "rejected")}
    assert answers <= {text for text, _ in calls} and all(any(each in text for text, _ in calls) for each in asked)
    assert set(calls.values()) == {1}, calls.most_common(3)


def test_what_an_encoder_keeps_is_bounded_and_travels(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny(model).texts
    ids = {text: encoder.answer("one", "chosen", text) for text in ("red circle", "two", "the star")}
    copy = pickle.loads(pickle.dumps(encoder))
    monkeypatch.setattr(TextEncoder, "_plain", lambda self, text: [1, 2, 3])
    assert {text: each.answer("two", "rejected", text) for each in (encoder, copy) for text in ids} == ids
    monkeypatch.setattr(token_rules, "_KEPT_TOKENS", 5)
    small = tiny(model).texts
    for text in ("red", "circle"):
        small.answer("one", "chosen", text)
    monkeypatch.setattr(TextEncoder, "_plain", lambda self, text: [6])
    assert [small.answer("one", "chosen", text) for text in ("red", "circle")] == [[1, 2, 3], [6]]


def test_a_record_above_the_budget_is_named(model: Path, tmp_path: Path) -> None:
    records = questions(3, 1)
    made = trainer(model, tmp_path, records, max_tokens_per_batch=70)
    with pytest.raises(DataError, match=r"max_tokens_per_batch=70: 1 records are longer by themselves, such as record-2 \("):
        batch_sampler(records, made.data_collator, made.args, made.progress)


def train(model: Path, output: Path, *, kill_after: int | None = None, **options: Any) -> None:
    """Three epochs of packed mDPO batches, a checkpoint every 2 steps."""
    made = trainer(
        model,
        output,
        questions(3, 3),
        loss_type=MDPO,
        max_tokens_per_batch=260,
        group_by_pictures=True,
        precompute_ref_log_probs=True,
        max_steps=-1,
        num_train_epochs=3,
        save_strategy="steps",
        save_steps=2,
        seed=7,
        callbacks=[LogFile(output / "log.jsonl"), *([] if kill_after is None else [KillAfter(kill_after)])],
        **options,
    )
    made.train(resume_from_checkpoint="auto")
    made.save_model(str(output / "final"))


def test_continued_training_on_packed_batches_is_the_same(model: Path, tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    train(model, undisturbed)
    expected = outcome(undisturbed)
    assert expected[1].count("\n") == 9
    # Killed in the second epoch, continued from its middle, with all of the third to come.
    prefetch = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    output = tmp_path / "killed"
    killed(partial(train, model, output, kill_after=5, **prefetch))
    train(model, output, **prefetch)
    assert_same(outcome(output), expected)
