"""mDPO in the trainer: where it starts, the reference cached and not, packed batches, records that are too long."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from training_cases import Gradients, config, preference_records, tiny, warm_adapter

from mmdpo_trainers.errors import DataError, StaleCacheError
from mmdpo_trainers.methods import METHODS, presets
from mmdpo_trainers.training.trainer import PreferenceTrainer

MDPO = ["sigmoid", "copo", "ancpo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llava")


def trained(
    folder: Path, output: Path, records: list[Any], *, warm: bool = False, **options: Any
) -> tuple[Any, list[dict[str, Any]], Gradients]:
    """A trainer after `train`, its training log, and its gradients."""
    loaded = tiny(folder)
    gradients = Gradients()
    settings = config(output, **{"loss_type": MDPO, "learning_rate": 0.0, **options})
    trainer = PreferenceTrainer(
        loaded.model, settings, processing_class=loaded.processor, train_dataset=records, callbacks=[gradients]
    )
    if warm:
        warm_adapter(trainer)
    trainer.train()
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry], gradients


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", ["crop", "blank", "other", "blur", "noise", "mask"])
def test_mdpo_starts_at_three_log_two(folder: Path, tmp_path: Path, cached: bool, kind: str) -> None:
    trainer, [entry], _ = trained(folder, tmp_path, preference_records(4), corruption=kind, precompute_ref_log_probs=cached)
    assert entry["loss"] == pytest.approx(3 * math.log(2), rel=1e-6)
    # The cache holds sums that were added up in another order.
    assert [entry[f"rewards/{name}"] for name in ("chosen", "corrupted")] == pytest.approx([0, 0], abs=1e-12)
    assert (tmp_path / "reference.jsonl").exists() == cached
    # A corruption changes what the model sees.
    assert abs(entry["logps/corrupted"] - entry["logps/chosen"]) > 1e-3


def test_separate_draws_do_not_start_at_log_two(folder: Path, tmp_path: Path) -> None:
    losses = []
    for cached in (False, True):
        _, [entry], _ = trained(
            folder, tmp_path / str(cached), preference_records(4), corruption_draw="separate", precompute_ref_log_probs=cached
        )
        losses.append(entry["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert abs(losses[0] - 3 * math.log(2)) > 1e-4


def test_a_cached_reference_changes_nothing(folder: Path, tmp_path: Path) -> None:
    records = preference_records(8)
    runs = [
        trained(folder, tmp_path / str(cached), records, warm=True, precompute_ref_log_probs=cached, max_steps=2)
        for cached in (False, True)
    ]
    (_, log, gradients), (_, cached_log, cached_gradients) = runs
    for one, other in zip(log, cached_log, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert abs(one["loss"] - 3 * math.log(2)) > 1e-3
    for step, cached_step in zip(gradients.steps, cached_gradients.steps, strict=True):
        for name, gradient in step.items():
            assert torch.allclose(gradient, cached_step[name], rtol=1e-8, atol=1e-10), name


def test_a_cache_serves_another_run_and_is_refused_for_another_reference(folder: Path, tmp_path: Path) -> None:
    records, cache = preference_records(4), tmp_path / "shared.jsonl"
    options = {"precompute_ref_log_probs": True, "reference_cache": str(cache)}
    trained(folder, tmp_path / "first", records, **options)
    before = cache.read_bytes()
    trained(folder, tmp_path / "second", records, **options)
    assert cache.read_bytes() == before and len(before.splitlines()) == 5
    # Another answer is another record; the others are still there.
    changed = [{**records[0], "chosen": [{"role": "assistant", "content": "a cat"}]}, *records[1:]]
    trained(folder, tmp_path / "third", changed, **options)
    assert cache.read_bytes().startswith(before) and len(cache.read_bytes().splitlines()) == 6
    loaded = tiny(folder)
    with torch.no_grad():
        loaded.model.lm_head.weight[0, 0] += 1
    trainer = PreferenceTrainer(
        loaded.model,
        config(tmp_path / "other", loss_type=MDPO, **options),
        processing_class=loaded.processor,
        train_dataset=records,
    )
    with pytest.raises(StaleCacheError, match="weights"):
        trainer.train()
    assert cache.read_bytes().startswith(before)


def test_a_picture_that_changes_during_training_is_named(folder: Path, tmp_path: Path) -> None:
    records = preference_records(2)
    picture = tmp_path / "picture.png"
    records[0]["images"][0].save(picture)
    records[0]["images"] = [str(picture), *records[0]["images"][1:]]
    loaded = tiny(folder)
    settings = config(tmp_path, loss_type=MDPO, precompute_ref_log_probs=True)
    trainer = PreferenceTrainer(loaded.model, settings, processing_class=loaded.processor, train_dataset=records)
    trainer.precompute_reference()
    records[1]["images"][0].save(picture)
    with pytest.raises(DataError, match="record record-0: text or pictures changed since the reference was run"):
        trainer.train()


def test_a_killed_reference_pass_ends_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    records = preference_records(10)
    for name in ("whole", "killed"):
        cache = tmp_path / f"{name}.jsonl"
        if name == "killed":
            # Half of the lines, and a line that was not written to its end.
            lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
            cache.write_bytes(b"".join(lines[:6]) + lines[6][:20])
        options = {"precompute_ref_log_probs": True, "reference_cache": str(cache), "per_device_eval_batch_size": 3}
        trained(folder, tmp_path / name, records, **options)
    found = [sorted((tmp_path / f"{name}.jsonl").read_text().splitlines()) for name in ("whole", "killed")]
    assert found[0] == found[1]


def test_evaluation_reads_the_cache_too(folder: Path, tmp_path: Path) -> None:
    loaded = tiny(folder)
    records = preference_records(6)
    trainer = PreferenceTrainer(
        loaded.model,
        config(tmp_path, loss_type=MDPO, precompute_ref_log_probs=True),
        processing_class=loaded.processor,
        eval_dataset=records[:3],
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(3 * math.log(2), rel=1e-6)
    assert trainer.evaluate(records[3:])["eval_rewards/corrupted_margins"] == pytest.approx(0, abs=1e-12)
    assert len((tmp_path / "reference.jsonl").read_text().splitlines()) == 7


def test_several_evaluation_sets(folder: Path, tmp_path: Path) -> None:
    loaded = tiny(folder)
    records = preference_records(4)
    settings = config(tmp_path, loss_type=MDPO, precompute_ref_log_probs=True, corruption="other", max_length=200)
    trainer = PreferenceTrainer(
        loaded.model, settings, processing_class=loaded.processor, eval_dataset={"x": records[:2], "y": records[2:]}
    )
    metrics = trainer.evaluate()
    assert metrics["eval_x_loss"] == pytest.approx(3 * math.log(2), rel=1e-6)
    assert metrics["eval_y_loss"] == pytest.approx(3 * math.log(2), rel=1e-6)


def test_adapters_that_would_change_the_reference(folder: Path, tmp_path: Path) -> None:
    loaded = tiny(folder)
    adapter = LoraConfig(r=2, target_modules=["q_proj"], bias="all")
    with pytest.raises(ValueError, match="expected bias 'none', got 'all'"):
        PreferenceTrainer(loaded.model, config(tmp_path), processing_class=loaded.processor, peft_config=adapter)
    on_vision = get_peft_model(
        tiny(folder).model, LoraConfig(r=2, target_modules=r".*vision_tower.*q_proj|.*language_model.*q_proj")
    )
    for name, parameter in on_vision.named_parameters():
        if "vision_tower" in name:
            parameter.requires_grad_(False)
    trainer = PreferenceTrainer(on_vision, config(tmp_path), processing_class=loaded.processor)
    assert not trainer.reference.shares_features


def several_questions(pictures: int, questions: int) -> list[dict[str, Any]]:
    """Records about `pictures` sets of pictures, `questions` each, the sets apart from each other."""
    base = [record for record in preference_records(6 * pictures) if len(record["images"]) > 1][:pictures]
    return [
        {
            **record,
            "id": f"{record['id']}/{number}",
            "prompt": [{"role": "user", "content": record["prompt"][0]["content"] + " red" * number}],
        }
        for number in range(questions)
        for record in base
    ]


def test_grouped_batches_run_shared_pictures_once_and_give_the_same_gradients(folder: Path, tmp_path: Path) -> None:
    records = several_questions(3, 4)
    options: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "warm": True}
    _, [plain], gradients = trained(folder, tmp_path / "plain", records, **options)
    trainer, [grouped], grouped_gradients = trained(folder, tmp_path / "grouped", records, group_by_pictures=True, **options)
    assert plain["loss"] == pytest.approx(grouped["loss"], rel=1e-6)
    for name, gradient in gradients.steps[0].items():
        # transformers' RMSNorm rounds to float32, differently in trees of other shapes.
        assert torch.dist(gradient, grouped_gradients.steps[0][name]) <= 1e-5 * gradient.norm(), name
    batches = [inputs["batch"] for inputs in trainer.get_train_dataloader()]
    assert sorted(len(batch.ids) for batch in batches) == [4, 4, 4]
    assert all(len({name.split("/")[0] for name in batch.ids}) == 1 for batch in batches)
    alone = sum(trainer.data_collator.tree_tokens(record) for record in records)
    assert sum(batch.input_ids.shape[1] for batch in batches) < 0.6 * alone


def test_batches_are_packed_to_a_token_budget(folder: Path, tmp_path: Path) -> None:
    records = preference_records(24)
    trainer, entries, _ = trained(folder, tmp_path, records, max_tokens_per_batch=260, num_train_epochs=1, max_steps=-1)
    batches = [inputs["batch"] for inputs in trainer.get_train_dataloader()]
    assert sorted(name for batch in batches for name in batch.ids) == sorted(record["id"] for record in records)
    assert all(batch.input_ids.shape[1] <= 260 for batch in batches)
    assert len(entries) == len(batches) < 24
    assert all(entry["loss"] == pytest.approx(3 * math.log(2), rel=1e-6) for entry in entries)
    with pytest.raises(DataError, match="max_tokens_per_batch=40.*raise it to"):
        trained(folder, tmp_path / "small", records, max_tokens_per_batch=40)


def test_records_that_are_too_long_are_left_out_or_refused(folder: Path, tmp_path: Path) -> None:
    records = preference_records(6)
    trainer, _, _ = trained(folder, tmp_path, records, max_length=60)
    assert trainer.left_out and len(trainer.train_dataset) + len(trainer.left_out) == 6
    with pytest.raises(DataError, match=f"record {trainer.left_out[0]}: .* tokens are more than max_length=60"):
        trained(folder, tmp_path / "strict", records, max_length=60, too_long="error")


def test_the_next_batch_is_prepared_in_another_process(folder: Path, tmp_path: Path) -> None:
    records = preference_records(8)
    logs = []
    for workers in (0, 1):
        _, log, _ = trained(folder, tmp_path / str(workers), records, warm=True, dataloader_num_workers=workers, max_steps=2)
        logs.append([{k: v for k, v in entry.items() if k in ("loss", "logps/chosen", "rewards/corrupted")} for entry in log])
    assert logs[0] == logs[1]


@pytest.mark.parametrize("loss", ["hinge", "ipo", "cdpo", "robust", "simpo", "orpo", "bco_pair", "kto_pair", "ancpo"])
def test_every_loss_trains(folder: Path, tmp_path: Path, loss: str) -> None:
    _, entries, _ = trained(folder, tmp_path, preference_records(4), loss_type=[loss], learning_rate=1e-2, max_steps=4)
    assert all(math.isfinite(entry["loss"]) for entry in entries)
    assert entries[-1]["rewards/margins"] > entries[0]["rewards/margins"] or loss == "ancpo"
    assert entries[-1]["loss"] < entries[0]["loss"]


PRESETS = presets(METHODS["mdpo"])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_settings(folder: Path, tmp_path: Path, name: str) -> None:
    data = preference_records(4)
    for view, response in PRESETS[name].get("further_branches", {}).values():
        for record in data:
            record.setdefault(view, record["images"][::-1])
            record.setdefault(response, record["rejected"])
    # A preset may also say what is sampled in training, which is no setting of the trainer's.
    settings = {key: value for key, value in PRESETS[name].items() if key != "online"}
    _, entries, _ = trained(folder, tmp_path, data, **{**settings, "max_steps": 1})
    assert math.isfinite(entries[0]["loss"])


def test_no_image_leaves_pictures_out(folder: Path, tmp_path: Path) -> None:
    trainer, _, _ = trained(folder, tmp_path, preference_records(4), loss_type=["sigmoid"], no_image=True)
    [inputs] = list(trainer.get_train_dataloader())
    assert inputs["batch"].pictures is None and trainer.data_collator.key(preference_records(4)[0])
    lines = json.dumps(inputs["batch"].input_ids.tolist())
    assert str(trainer.model.config.image_token_id) not in lines.strip("[]").split(", ")
