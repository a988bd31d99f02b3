"""`PreferenceTrainer`: exact against separate sequences through the unpatched model, and what it logs and refuses."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import logsigmoid
from training_cases import Gradients, config, preference_records, tiny, warm_adapter
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mmdpo_kernels import linear_logprobs
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.training import head
from mmdpo_trainers.training import trainer as preference_trainer
from mmdpo_trainers.training.config import PreferenceConfig
from mmdpo_trainers.training.trainer import PreferenceTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(autouse=True)
def exact_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' RMSNorm rounds to float32 whatever the model's dtype; float64 comparisons need it exact, on both sides."""
    original = LlamaRMSNorm.forward

    def forward(self: LlamaRMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != torch.float64:
            return original(self, hidden_states)
        return torch.nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def plain_logps(model: torch.nn.Module, processor: Any, record: dict[str, Any], column: str) -> torch.Tensor:
    """Summed log-probability of a response, from the unpatched model's logits of that one sequence."""
    text = f"USER: {record['prompt'][0]['content']} ASSISTANT:"
    inputs = dict(processor(text=text, images=record["images"] or None, return_tensors="pt"))
    tokenizer = processor.tokenizer
    response = tokenizer(record[column][0]["content"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    prompt = inputs["input_ids"]
    inputs["input_ids"] = torch.cat([prompt, torch.tensor([response])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    logps = model(**inputs).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
    return logps.gather(1, torch.tensor(response)[:, None]).sum()


def plain_loss(policy: Any, reference: Any, processor: Any, records: list[dict[str, Any]], nll_weight: float) -> torch.Tensor:
    """DPO plus weighted per-token NLL, from the definitions."""
    losses, chosen_sum, tokens = [], torch.zeros((), dtype=torch.float64), 0
    for record in records:
        chosen, rejected = (plain_logps(policy, processor, record, column) for column in ("chosen", "rejected"))
        with torch.no_grad(), reference() as model:
            chosen_ref, rejected_ref = (plain_logps(model, processor, record, column) for column in ("chosen", "rejected"))
        losses.append(-logsigmoid(0.1 * ((chosen - chosen_ref) - (rejected - rejected_ref))))
        chosen_sum = chosen_sum + chosen
        tokens += len(processor.tokenizer(record["chosen"][0]["content"], add_special_tokens=False).input_ids) + 1
    return torch.stack(losses).mean() - nll_weight * chosen_sum / tokens


class Reference:
    """Context that gives the reference model: a second one, or the policy with its adapter off."""

    def __init__(self, model: Any, peft: bool) -> None:
        self.model, self.peft = model, peft

    def __call__(self) -> Reference:
        return self

    def __enter__(self) -> Any:
        self.off = self.model.disable_adapter() if self.peft else None
        if self.off is not None:
            self.off.__enter__()
        return self.model

    def __exit__(self, *error: Any) -> None:
        if self.off is not None:
            self.off.__exit__(None, None, None)


def assert_equal_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys() and found
    scale = max(float(gradient.norm()) for gradient in expected.values())
    assert scale > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance * scale)


def named_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


ADAPTERS = {
    "language": None,
    "lm_head": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj", "lm_head"]),
    "saved_head": LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj"], modules_to_save=["lm_head"]),
    "vision": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
}


@pytest.mark.parametrize("tree_packing", [True, False])
@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_adapter_training_equals_separate_sequences(folder: Path, tmp_path: Path, adapter: str, tree_packing: bool) -> None:
    loaded = tiny(folder)
    plain = copy.deepcopy(loaded.model)
    records = preference_records(7)
    # The same question about the same pictures with other answers: its prompt is shared in the tree.
    records.append({**records[0], "id": "again", "chosen": records[1]["chosen"]})
    settings = config(tmp_path, loss_type=["sigmoid", "nll"], loss_weights=[1.0, 0.3], tree_packing=tree_packing)
    own = copy.deepcopy(ADAPTERS[adapter])
    trainer = PreferenceTrainer(loaded.model, settings, processing_class=loaded.processor, train_dataset=records, peft_config=own)
    warm_adapter(trainer)
    plain = get_peft_model(plain, copy.deepcopy(trainer.model.peft_config["default"]))
    plain.load_state_dict(trainer.model.state_dict())
    expected = plain_loss(plain, Reference(plain, True), loaded.processor, records, 0.3)
    expected.backward()

    loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator(records))
    loss.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    assert_equal_gradients(named_gradients(trainer.model), named_gradients(plain), 1e-9)


@pytest.mark.parametrize("given_reference", [False, True])
@pytest.mark.parametrize("frozen", [True, False])
def test_full_training_equals_separate_sequences(folder: Path, tmp_path: Path, given_reference: bool, frozen: bool) -> None:
    loaded, plain = tiny(folder), tiny(folder).model
    other = tiny(folder.parent / "other", seed=3).model if given_reference else copy.deepcopy(plain)
    given = copy.deepcopy(other) if given_reference else None
    records = preference_records(6)
    settings = config(tmp_path, full_finetune=True, freeze_vision=frozen, freeze_projector=frozen)
    trainer = PreferenceTrainer(loaded.model, settings, processing_class=loaded.processor, train_dataset=records, ref_model=given)
    warm_adapter(trainer)
    plain.load_state_dict(trainer.model.state_dict())
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(not (frozen and ("vision_tower" in name or "projector" in name)))
    expected = plain_loss(plain, Reference(other, False), loaded.processor, records, 0.0)
    expected.backward()

    loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator(records))
    loss.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    assert_equal_gradients(named_gradients(trainer.model), named_gradients(plain), 1e-9)


def test_float32_within_rounding(folder: Path, tmp_path: Path) -> None:
    """The packed float32 loss is about as close to float64 truth as the unpatched model's own."""
    records = preference_records(6)
    losses = {}
    for dtype, packing in ((torch.float64, True), (torch.float32, True), (torch.float32, False)):
        loaded = tiny(folder, dtype)
        trainer = PreferenceTrainer(
            loaded.model, config(tmp_path, tree_packing=packing), processing_class=loaded.processor, train_dataset=records
        )
        warm_adapter(trainer)
        losses[dtype, packing] = trainer.compute_loss(trainer.model.train(), trainer.data_collator(records)).item()
    truth = losses[torch.float64, True]
    error, plain_error = (abs(losses[torch.float32, packing] - truth) for packing in (True, False))
    assert error <= 2 * plain_error + 1e-5 * truth


def run_step(folder: Path, output: Path, records: list[dict[str, Any]], **options: Any) -> dict[str, torch.Tensor]:
    loaded, gradients = tiny(folder), Gradients()
    trainer = PreferenceTrainer(
        loaded.model, config(output, **options), processing_class=loaded.processor, train_dataset=records, callbacks=[gradients]
    )
    if not trainer.args.full_finetune:
        warm_adapter(trainer)
    trainer.train()
    assert len(gradients.steps) == 1
    return gradients.steps[0]


def test_accumulated_gradient_equals_the_whole_batch(folder: Path, tmp_path: Path) -> None:
    """Also with micro-batches of unequal numbers of records and of chosen tokens (3 + 3 + 2)."""
    records = preference_records(8)
    losses = {"loss_type": ["sigmoid", "nll"], "loss_weights": [1.0, 0.5]}
    whole = run_step(folder, tmp_path, records, per_device_train_batch_size=8, **losses)
    for batch, accumulation in ((4, 2), (3, 3)):
        parts = run_step(
            folder, tmp_path, records, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, **losses
        )
        assert_equal_gradients(parts, whole, 1e-10)


@pytest.mark.parametrize("full", [False, True])
def test_gradient_checkpointing_changes_nothing(folder: Path, tmp_path: Path, full: bool) -> None:
    records = preference_records(4)
    options = {"full_finetune": full, "freeze_vision": not full, "freeze_projector": not full, "attention_layer": 1}
    plain = run_step(folder, tmp_path, records, **options)
    for reentrant in (True, False):
        checkpointed = run_step(
            folder,
            tmp_path,
            records,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
            **options,
        )
        assert_equal_gradients(checkpointed, plain, 1e-10)


@pytest.mark.smoke
def test_loss_starts_at_log_2_and_logs_trl_keys(folder: Path, tmp_path: Path) -> None:
    loaded = tiny(folder, torch.float32)
    trainer = PreferenceTrainer(
        loaded.model,
        config(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2, attention_layer=1, gradient_accumulation_steps=2),
        processing_class=loaded.processor,
        train_dataset=preference_records(8),
        eval_dataset=preference_records(5),
    )
    trainer.train()
    first, second, evaluation = (entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert second["loss"] != first["loss"]
    keys = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"}
    keys |= {"attn/ratio_sequence", "attn/ratio_grid"}
    assert keys <= first.keys()
    assert {f"eval_{key}" for key in keys} <= evaluation.keys()
    margin = first["rewards/chosen"] - first["rewards/rejected"]
    assert first["rewards/margins"] == pytest.approx(margin, abs=1e-6)


@pytest.mark.parametrize("dtype, autocast", [(torch.bfloat16, False), (torch.float32, True)])
def test_bfloat16(folder: Path, tmp_path: Path, dtype: torch.dtype, autocast: bool) -> None:
    """Weights in bfloat16, or float32 under autocast: log-probabilities stay close to float64's and training goes on."""
    records = preference_records(4)
    loaded, exact = tiny(folder, dtype), tiny(folder)
    truth = PreferenceTrainer(exact.model, config(tmp_path), processing_class=exact.processor)
    truth.compute_loss(truth.model.train(), truth.data_collator(records))
    expected = truth._averages["train"].take()
    trainer = PreferenceTrainer(
        loaded.model, config(tmp_path, bf16=autocast, max_steps=2), processing_class=loaded.processor, train_dataset=records
    )
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    for key in ("logps/chosen", "logps/rejected"):
        assert first[key] == pytest.approx(expected[key], rel=0.02)
    assert second["rewards/margins"] > 0


@pytest.mark.parametrize("losses", [["sigmoid"], ["sigmoid", "nll"], ["nll"]])
def test_evaluation_is_that_of_one_batch(folder: Path, tmp_path: Path, losses: list[str]) -> None:
    """A last batch of one record weighs as one record, and its chosen response by its tokens."""
    records = preference_records(5)
    found = []
    for batch in (5, 4):
        loaded = tiny(folder)
        trainer = PreferenceTrainer(
            loaded.model,
            config(
                tmp_path,
                per_device_eval_batch_size=batch,
                attention_layer=2,
                loss_type=losses,
                loss_weights=[0.7, 0.3][-len(losses) :],
            ),
            processing_class=loaded.processor,
            eval_dataset=records,
        )
        warm_adapter(trainer)
        metrics = trainer.evaluate()
        if batch == 5:
            whole = trainer.compute_loss(trainer.model, trainer.data_collator(records)).item()
            assert metrics["eval_loss"] == pytest.approx(whole, rel=1e-9)
        assert "eval_pairwise_loss" not in metrics
        found.append({key: value for key, value in metrics.items() if "/" in key or key == "eval_loss"})
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        assert found[1][key] == pytest.approx(value, rel=1e-9), key


@pytest.mark.parametrize("tree_packing", [True, False])
def test_attention_ratio_is_the_models_own(folder: Path, tmp_path: Path, tree_packing: bool) -> None:
    """Against the unpatched model's eager attention maps: mean over heads and chosen rows, summed over each picture."""
    loaded = tiny(folder)
    plain = copy.deepcopy(loaded.model)
    plain.set_attn_implementation("eager")
    record, grid = preference_records(5)[4], preference_records(2)[1]
    trainer = PreferenceTrainer(
        loaded.model, config(tmp_path, attention_layer=1, tree_packing=tree_packing), processing_class=loaded.processor
    )
    trainer.compute_loss(trainer.model.train(), trainer.data_collator([record, grid]))
    logged = trainer._averages["train"].take()

    for case, key in ((record, "attn/ratio_sequence"), (grid, "attn/ratio_grid")):
        text = f"USER: {case['prompt'][0]['content']} ASSISTANT: {case['chosen'][0]['content']} </s>"
        inputs = dict(loaded.processor(text=text, images=case["images"], return_tensors="pt"))
        inputs["pixel_values"] = inputs["pixel_values"].double()
        response = len(loaded.processor.tokenizer(case["chosen"][0]["content"] + "</s>", add_special_tokens=False).input_ids)
        attention = plain(**inputs, output_attentions=True).attentions[1][0].mean(0)[-response - 1 : -1].mean(0)
        pictures = attention[inputs["input_ids"][0] == loaded.image_token_id].view(len(case["images"]), 4, 4)
        target = pictures[0, 0:2, 0:3] if key.endswith("grid") else pictures[case["target"]]
        # transformers' eager softmax is float32.
        assert logged[key] == pytest.approx((target.sum() / pictures.sum()).item(), rel=1e-6)


def test_record_without_attention_has_no_ratio(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny(folder, torch.float32)
    trainer = PreferenceTrainer(loaded.model, config(tmp_path, attention_layer=1), processing_class=loaded.processor)
    first, second = (preference_records(5)[index] for index in (0, 4))
    inputs = trainer.data_collator([first, {**second, "images": second["images"][::-1]}])
    seen, unseen = inputs["batch"].ratios
    mass = torch.zeros(1, 8)
    mass[0, seen.first : seen.first + seen.count] = 1 / seen.count
    assert seen.format == unseen.format and unseen.ratio(mass) is None

    @contextlib.contextmanager
    def recorded(*args: Any, **options: Any) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(mass={1: mass})

    monkeypatch.setattr(preference_trainer, "record_attention", recorded)
    trainer.compute_loss(trainer.model.train(), inputs)
    assert trainer._averages["train"].take()[f"attn/ratio_{seen.format}"] == pytest.approx(1 / seen.count)


@pytest.mark.parametrize("adapter, products", [("language", [True]), ("lm_head", [False, False]), ("saved_head", [False, False])])
def test_policy_and_reference_go_through_a_shared_head_together(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: str, products: list[bool]
) -> None:
    loaded = tiny(folder)
    records = preference_records(4)
    own = copy.deepcopy(ADAPTERS[adapter])
    trainer = PreferenceTrainer(
        loaded.model, config(tmp_path), processing_class=loaded.processor, train_dataset=records, peft_config=own
    )
    calls, rows = [], []

    def counted(hidden: torch.Tensor, *args: Any, reference_hidden: torch.Tensor | None = None, **options: Any) -> Any:
        calls.append(reference_hidden is not None)
        rows.append(len(hidden))
        return linear_logprobs(hidden, *args, reference_hidden=reference_hidden, **options)

    monkeypatch.setattr(head, "linear_logprobs", counted)
    inputs = trainer.data_collator(records)
    trainer.compute_loss(trainer.model.train(), inputs)
    assert calls == products
    # Chosen and rejected responses begin at one row, and some begin alike; the head sees such a row once.
    if adapter == "language":
        assert rows[0] <= len(inputs["batch"].targets) - len(records)


def test_only_nll_runs_no_reference(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny(folder, torch.float32)
    trainer = PreferenceTrainer(
        loaded.model, config(tmp_path, loss_type=["nll"]), processing_class=loaded.processor, train_dataset=preference_records(4)
    )
    for name in ("rows", "token_logps"):
        monkeypatch.setattr(trainer.reference, name, lambda *a: pytest.fail("the reference was run"))
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(entry["nll_loss"], rel=1e-6)
    assert not any(key.startswith("rewards/") for key in entry)


def test_language_adapter_leaves_vision_projector_and_head(folder: Path, tmp_path: Path) -> None:
    loaded = tiny(folder, torch.float32)
    trainer = PreferenceTrainer(loaded.model, config(tmp_path), processing_class=loaded.processor)
    adapted = {name.split(".lora_")[0] for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(adapted) == 7 * 3
    assert all(".language_model.layers." in name for name in adapted)


def test_loaded_adapter_must_be_trainable(folder: Path, tmp_path: Path) -> None:
    loaded = tiny(folder, torch.float32)
    get_peft_model(copy.deepcopy(loaded.model), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    fixed = PeftModel.from_pretrained(tiny(folder, torch.float32).model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="got none; load it with is_trainable=True"):
        PreferenceTrainer(fixed, config(tmp_path), processing_class=loaded.processor)
    policy = PeftModel.from_pretrained(loaded.model, tmp_path / "adapter", is_trainable=True)
    trainer = PreferenceTrainer(policy, config(tmp_path), processing_class=loaded.processor, train_dataset=preference_records(4))
    before = {name: p.clone() for name, p in policy.named_parameters() if "lora_B" in name}
    trainer.train()
    assert before and all(not torch.equal(p, before[name]) for name, p in policy.named_parameters() if name in before)


def test_reference_leaves_frozen_weights_frozen(folder: Path, tmp_path: Path) -> None:
    loaded = tiny(folder, torch.float32)
    policy = get_peft_model(loaded.model, LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in policy.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    trainer = PreferenceTrainer(policy, config(tmp_path), processing_class=loaded.processor)
    trainer.compute_loss(trainer.model.train(), trainer.data_collator(preference_records(2)))
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_B" in name for name in trained)


HEAD_ADAPTERS = {
    "use_dora": LoraConfig(r=2, target_modules=["lm_head"], use_dora=True),
    "loha": LoHaConfig(r=2, target_modules=["lm_head"]),
    "tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"lm_head": [1]}),
}


@pytest.mark.parametrize("adapter", list(HEAD_ADAPTERS))
def test_head_takes_plain_lora_only(folder: Path, tmp_path: Path, adapter: str) -> None:
    loaded = tiny(folder, torch.float32)
    own = copy.deepcopy(HEAD_ADAPTERS[adapter])
    with pytest.raises(ValueError, match="output head: expected no adapter or plain LoRA"):
        PreferenceTrainer(loaded.model, config(tmp_path), processing_class=loaded.processor, peft_config=own)


def test_each_distinct_picture_is_encoded_once(folder: Path, tmp_path: Path) -> None:
    loaded = tiny(folder, torch.float32)
    trainer = PreferenceTrainer(loaded.model, config(tmp_path), processing_class=loaded.processor)
    seen: list[int] = []
    loaded.model.model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    records = preference_records(5)
    trainer.compute_loss(trainer.model.train(), trainer.data_collator(records))
    distinct = {id(picture) for record in records for picture in record["images"]}
    assert seen == [len(distinct)]


def test_dropout_is_off(folder: Path, tmp_path: Path) -> None:
    loaded = tiny(folder, torch.float32)
    for layer in loaded.model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    trainer = PreferenceTrainer(loaded.model, config(tmp_path), processing_class=loaded.processor)
    batch = trainer.data_collator(preference_records(3))
    first, second = (trainer.compute_loss(trainer.model.train(), batch) for _ in range(2))
    assert first == second
    dropping = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="lora_dropout 0, got 0.1"):
        PreferenceTrainer(tiny(folder).model, config(tmp_path), processing_class=loaded.processor, peft_config=dropping)


def test_long_records_are_left_out_and_named(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = tiny(folder, torch.float32)
    records = preference_records(5)
    with caplog.at_level(logging.WARNING, logger="mmdpo_trainers"):
        trainer = PreferenceTrainer(
            loaded.model, config(tmp_path, max_length=60), processing_class=loaded.processor, train_dataset=records
        )
    assert trainer.left_out == ["record-2", "record-4"]
    assert "record-4" in caplog.text
    assert [record["id"] for record in trainer.train_dataset] == ["record-0", "record-1", "record-3"]


def test_nothing_to_train_on_is_said(folder: Path, tmp_path: Path) -> None:
    loaded = tiny(folder, torch.float32)
    records = preference_records(3)
    for left, limit, message in ((records, 5, "; 3 are longer than max_length=5, raise it"), ([], None, "")):
        arguments = config(tmp_path, max_length=limit)
        trainer = PreferenceTrainer(loaded.model, arguments, processing_class=loaded.processor, train_dataset=left)
        with pytest.raises(DataError, match=f"train_dataset: expected records, got none{message}$"):
            trainer.train()
        loaded = tiny(folder, torch.float32)


def test_bad_records_are_named(folder: Path, tmp_path: Path) -> None:
    loaded = tiny(folder, torch.float32)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    good = preference_records(1)[0]
    cases = {
        "broken.png": {"images": [good["images"][0], str(broken)]},
        "missing.png": {"images": [good["images"][0], str(tmp_path / "missing.png")]},
        "2 <image> placeholders for 1 pictures": {"images": good["images"][:1]},
        "chosen must be text or a list of one assistant message": {"chosen": good["chosen"] * 2},
        "chosen has <image>, which stands for a picture": {"chosen": [{"role": "assistant", "content": "like <image>"}]},
        "rejected[0]['content'][0] is a picture; only prompts have pictures": {
            "rejected": [{"role": "assistant", "content": [{"type": "image"}]}]
        },
        "region": {"images": good["images"][:1], "prompt": "<image>\nwhat ?", "region": [0, 0, 9, 9], "patch_grid": [4, 4]},
        "region is on [8, 8] patches": {
            "images": good["images"][:1],
            "prompt": "<image>\nwhat ?",
            "region": [0, 0, 2, 2],
            "patch_grid": [8, 8],
        },
        "target must be the 0-based index of the asked-about picture, 0 to 1": {"target": 9},
        "images must be a list": {"images": "x.png"},
        "a picture: not a picture": {"images": [good["images"][0], {"bytes": b"not a picture", "path": None}]},
        "chosen is empty": {"chosen": [{"role": "assistant", "content": " "}]},
        "chosen[0]['content'] must be text or a list of parts": {"chosen": [{"role": "assistant", "content": None}]},
        "chosen must be text": {"chosen": ["x"]},
        "column 'videos' is not read": {"videos": ["a.mp4"]},
        "chosen: the chat template does not print the thinking of turn 2 (assistant)": {
            "chosen": [{"role": "assistant", "content": "a", "reasoning_content": "hm"}]
        },
    }
    for message, changes in cases.items():
        with pytest.raises(DataError, match="culprit") as error:
            PreferenceTrainer(
                tiny(folder, torch.float32).model,
                config(tmp_path),
                processing_class=loaded.processor,
                train_dataset=[{**good, "id": "culprit", **changes}],
            ).train()
        assert message in str(error.value)


def test_region_for_other_patches_comes_from_the_box(folder: Path, tmp_path: Path) -> None:
    loaded = tiny(folder, torch.float32)
    grid = preference_records(2)[1]
    trainer = PreferenceTrainer(loaded.model, config(tmp_path), processing_class=loaded.processor, train_dataset=[grid])
    batches = [
        trainer.data_collator([{**grid, "region": region, "patch_grid": patches, "box": [0.0, 0.0, 0.75, 0.5]}])["batch"]
        for region, patches in (([0, 0, 2, 3], [4, 4]), ([0, 0, 4, 6], [8, 8]), (None, None))
    ]
    assert (batches[0].segments == 0).sum() == 6
    for batch in batches[1:]:
        assert torch.equal(batch.segments, batches[0].segments) and batch.ratios == batches[0].ratios


def test_settings_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    loaded = tiny(folder, torch.float32)
    for options, message in (
        ({"loss_type": ["sigmoid", "dpo"]}, "loss_type: expected one or more of sigmoid"),
        ({"label_smoothing": 0.1}, "label_smoothing: it acts on cdpo, robust only"),
        ({"anchors": ["prompt"]}, "anchors: expected one or more of chosen"),
        ({"anchors": ["chosen", "chosen"]}, "anchors: expected each once"),
        ({"loss_type": ["sigmoid", "sigmoid"]}, "loss_type: expected each once"),
        ({"anchor": float("nan")}, "anchor: expected a finite number"),
        ({"simpo_gamma": -1.0}, "simpo_gamma: expected a finite number of 0 or more"),
        ({"corruption": "melt"}, "corruption kind: expected one of crop"),
        ({"no_image": True, "loss_type": ["sigmoid", "copo"]}, "no_image: without pictures there is none to corrupt"),
        ({"too_long": "cut"}, "too_long: expected 'drop' or 'error'"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch: expected 1 or more tokens"),
        ({"group_by_pictures": True, "tree_packing": False}, "group_by_pictures: padded, separate sequences"),
        ({"changed_token_weight": 2.0, "loss_type": ["ipo"]}, "changed_token_weight: weighted log-probabilities"),
        ({"loss_weights": [1.0, 2.0]}, "loss_weights: expected one a loss"),
        ({"beta": 0.0}, "beta: expected a value above 0"),
        ({"loss_weights": [float("nan")]}, "loss_weights: expected finite numbers"),
        ({"num_train_epochs": 0}, "num_train_epochs: expected a number above 0, got 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: expected a whole number of 1 or more, got 0"),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps: expected a whole number of 1 or more, got -1"),
        ({"learning_rate": "fast"}, "learning_rate: expected a number of 0 or more"),
        ({"learning_rate": -1.0}, "learning_rate: expected a number of 0 or more"),
        ({"save_total_limit": 1}, "save_total_limit: expected at least 2"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"save_strategy": "steps", "eval_strategy": "epoch"}, "eval_strategy: 'epoch' needs save_strategy"),
    ):
        with pytest.raises(ValueError, match=message):
            config(tmp_path, **options)
    with pytest.raises(ValueError, match="attention_layer: expected 0 to 2"):
        PreferenceTrainer(loaded.model, config(tmp_path, attention_layer=3), processing_class=loaded.processor)
    with pytest.raises(ValueError, match="full_finetune"):
        adapter = LoraConfig(r=2, target_modules=["q_proj"])
        settings = config(tmp_path, full_finetune=True)
        PreferenceTrainer(loaded.model, settings, processing_class=loaded.processor, peft_config=adapter)


def test_every_field_is_explained() -> None:
    own = PreferenceConfig.__annotations__
    fields = PreferenceConfig.__dataclass_fields__
    assert all(fields[name].metadata.get("help") for name in own)
