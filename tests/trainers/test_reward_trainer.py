"""`RewardTrainer`: exact against separate sequences through the unpatched model, its loss against TRL's, and what it saves and refuses."""

from __future__ import annotations

import copy
import shutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import logsigmoid
from training_cases import Gradients, config, preference_records, tiny, warm_adapter
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mmdpo_trainers.errors import DataError
from mmdpo_trainers.training.config import PreferenceConfig
from mmdpo_trainers.training.reward.config import RewardConfig
from mmdpo_trainers.training.reward.inputs import RewardInputs
from mmdpo_trainers.training.reward.loss import bradley_terry
from mmdpo_trainers.training.reward.model import RewardModel
from mmdpo_trainers.training.reward.score_head import HEAD
from mmdpo_trainers.training.reward.trainer import RewardTrainer

FACTS = ["caption", "options"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(autouse=True)
def exact_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' RMSNorm rounds to float32 whatever the model's dtype; float64 comparisons need it exact, on both sides."""
    original = LlamaRMSNorm.forward

    def forward(self: LlamaRMSNorm, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != torch.float64:
            return original(self, hidden_states)
        return torch.nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def settings(output: Path, **options: Any) -> RewardConfig:
    made: RewardConfig = config(output, kind=RewardConfig, **options)
    return made


def records(count: int = 7) -> list[dict[str, Any]]:
    """Records with facts and margins, some of each without, and two questions about the same pictures."""
    found = preference_records(count)
    for number, record in enumerate(found):
        record["caption"] = ["a red circle", ["the star is blue", "two shapes"], None][number % 3]
        record["options"] = ["red", "blue"] if number % 2 else None
        record["margin"] = [0.5, None, -1][number % 3]
    return [*found, {**found[0], "id": "again", "chosen": found[1]["chosen"], "caption": "a star"}]


def plain_reward(model: Any, processor: Any, record: dict[str, Any], column: str, facts: bool) -> Tensor:
    """A response's reward, from the unpatched model's hidden states of that one sequence."""
    text = record["prompt"][0]["content"]
    if facts and record["caption"]:
        caption = record["caption"] if isinstance(record["caption"], str) else " ".join(record["caption"])
        text += f"\n\nCaption: {caption}"
    if facts and record["options"]:
        text += f"\n\nOptions: {', '.join(record['options'])}"
    inputs = dict(processor(text=f"USER: {text} ASSISTANT:", images=record["images"] or None, return_tensors="pt"))
    tokenizer = processor.tokenizer
    response = tokenizer(record[column][0]["content"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([response])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    base = model.get_base_model()
    return getattr(base, HEAD)(base.base_model(**inputs).last_hidden_state[0, -1])[0]


def plain_loss(model: Any, processor: Any, cases: list[dict[str, Any]], *, facts: bool, center: float) -> Tensor:
    """Bradley and Terry's likelihood with margins, and the mean reward held at 0, from the definitions."""
    losses = []
    for record in cases:
        chosen, rejected = (plain_reward(model, processor, record, column, facts) for column in ("chosen", "rejected"))
        losses.append(-logsigmoid(chosen - rejected - (record["margin"] or 0.0)) + center * (chosen + rejected) ** 2)
    return torch.stack(losses).mean()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and any(HEAD in name for name in found)
    scale = max(float(gradient.norm()) for gradient in expected.values())
    assert scale > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9 * scale)


def trainer_of(
    folder: Path, output: Path, data: list[dict[str, Any]], dtype: torch.dtype = torch.float64, **options: Any
) -> RewardTrainer:
    loaded = tiny(folder, dtype)
    own = {name: options.pop(name) for name in ("peft_config", "eval_dataset", "callbacks") if name in options}
    return RewardTrainer(loaded.model, settings(output, **options), processing_class=loaded.processor, train_dataset=data, **own)


@pytest.mark.parametrize(
    ("options", "lora"),
    [
        ({"facts": FACTS, "center_rewards_coefficient": 0.01}, None),
        ({"facts": FACTS, "tree_packing": False}, None),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, None),
        ({"facts": FACTS}, {"target_modules": "all-linear", "exclude_modules": [HEAD]}),
    ],
    ids=["tree", "padded", "checkpointed", "vision"],
)
def test_training_equals_separate_sequences(
    folder: Path, tmp_path: Path, options: dict[str, Any], lora: dict[str, Any] | None
) -> None:
    cases = records()
    adapter = None if lora is None else LoraConfig(r=4, lora_alpha=8, **lora)
    trainer = trainer_of(folder, tmp_path, cases, peft_config=adapter, **options)
    warm_adapter(trainer)
    plain: Any = tiny(folder).model
    setattr(plain, HEAD, torch.nn.Linear(plain.config.get_text_config().hidden_size, 1, bias=False, dtype=torch.float64))
    plain = get_peft_model(plain, copy.deepcopy(trainer.model.peft_config["default"]))
    plain.load_state_dict(trainer.model.state_dict())
    processor, center = trainer.processing_class, options.get("center_rewards_coefficient") or 0.0
    expected = plain_loss(plain, processor, cases, facts="facts" in options, center=center)
    expected.backward()

    loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator(cases))
    loss.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    assert_close(gradients(trainer.model), gradients(plain))


def test_micro_batches_add_up_to_one(folder: Path, tmp_path: Path) -> None:
    found = []
    for size in (1, 8):
        seen = Gradients()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "callbacks": [seen]}
        trainer = trainer_of(folder, tmp_path / str(size), records(), **options)
        warm_adapter(trainer)
        trainer.train()
        found.append((seen.steps[0], trainer.state.log_history[0]))
    assert_close(found[0][0], found[1][0])
    for name in ("loss", "accuracy", "margin", "mean_reward"):
        assert found[0][1][name] == pytest.approx(found[1][1][name], rel=1e-9)


@pytest.mark.parametrize("center", [None, 0.01])
@pytest.mark.parametrize("with_margins", [False, True])
def test_loss_is_trls(center: float | None, with_margins: bool) -> None:
    from trl import RewardTrainer as TrlTrainer

    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 2, generator=generator, dtype=torch.float64).requires_grad_()
    margins = torch.rand(6, generator=generator, dtype=torch.float64) if with_margins else None
    theirs = scores.detach().T.reshape(12, 1).requires_grad_()
    same = SimpleNamespace(gather=lambda each: each, gather_for_metrics=lambda each: each)
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=same,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(12, 1), **({} if margins is None else {"margin": margins})}
    expected = TrlTrainer.compute_loss(stand_in, lambda **_: SimpleNamespace(logits=theirs), inputs)  # type: ignore[arg-type]
    expected.backward()

    loss = bradley_terry(scores, margins, center).mean()
    loss.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(scores.grad, theirs.grad.view(2, 6).T, rtol=1e-12, atol=1e-15)
    share = float((scores[:, 0] > scores[:, 1]).double().mean())
    assert stand_in._metrics["train"]["accuracy"] == [pytest.approx(share, rel=1e-6)]


def test_loss_where_rewards_are_the_same() -> None:
    assert bradley_terry(torch.full((2, 2), 3.0, dtype=torch.float64)).tolist() == pytest.approx([0.6931471805599453] * 2)


def test_what_is_saved_is_read_back_exactly(folder: Path, tmp_path: Path) -> None:
    data = records()
    trainer = trainer_of(folder, tmp_path, data, torch.float32, facts=FACTS, max_steps=3, eval_dataset=data)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    batch = trainer.data_collator.batch(data)
    expected = trainer._scores(batch, training=False, averages=trainer._averages["eval"]).detach().double()
    model = RewardModel.load(tmp_path / "final", dtype="float32", device="cpu")
    pairs = [[record[column][0]["content"] for column in ("chosen", "rejected")] for record in data]
    assert torch.equal(torch.tensor(model.rewards(data, pairs), dtype=torch.float64), expected)
    assert model.inputs == RewardInputs(facts=tuple(FACTS))
    # Of the same name as the trainer's own evaluation.
    accuracy = float((expected[:, 0] > expected[:, 1]).double().mean())
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(accuracy)
    assert trainer.state.log_history[-1]["eval_loss"] > 0


def test_resumed_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 3, "facts": FACTS}
    options |= {"logging_steps": 3, "per_device_train_batch_size": 2}
    whole = trainer_of(folder, tmp_path / "run", records(), torch.float32, **options)
    whole.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    again = trainer_of(folder, tmp_path / "run", records(), torch.float32, **options)
    again.train(resume_from_checkpoint="auto")
    expected = whole.model.state_dict()
    assert any(HEAD in name for name in expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())
    logged = [
        [entry[name] for entry in each.state.log_history if "loss" in entry for name in ("loss", "margin")]
        for each in (whole, again)
    ]
    assert logged[0] == logged[1]
    with pytest.raises(ValueError, match="checkpoint-4 was trained with other facts"):
        trainer_of(folder, tmp_path / "run", records(), torch.float32, **{**options, "facts": []}).train(
            resume_from_checkpoint="auto"
        )


def test_a_trained_model_goes_on(folder: Path, tmp_path: Path) -> None:
    """A reward model's own PeftModel is trained on, and its head is not a new one."""
    first = trainer_of(folder, tmp_path / "first", records(), torch.float32, max_steps=2)
    first.train()
    head = first.model.get_base_model().reward_head.weight.detach().clone()
    second = RewardTrainer(
        first.model, settings(tmp_path / "second"), processing_class=first.processing_class, train_dataset=records()
    )
    assert torch.equal(second.model.get_base_model().reward_head.weight, head)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": ["ipo"]}, "loss_type: a reward model compares rewards"),
        ({"beta": 0.2}, "beta: a reward model compares rewards"),
        ({"full_finetune": True}, "full_finetune: a reward model is trained as an adapter"),
        ({"facts": ["truth"]}, "facts: expected some of answer, caption, options, each once, got"),
        ({"facts": "caption"}, "facts: expected a list, got the text 'caption'"),
        ({"facts_template": "{{ prompt"}, "facts_template: expected a jinja2 template"),
        ({"facts_template": "{{ caption }}"}, "facts_template: expected a template that holds {{ prompt }}"),
        ({"center_rewards_coefficient": -1}, "center_rewards_coefficient: expected a number of 0 or more"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("}", r"\}")):
        settings(tmp_path, **options)


def test_models_and_records_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    data = records()
    loaded = tiny(folder, torch.float32)

    def made(model: Any = loaded.model, args: Any = None, data: Any = data, **others: Any) -> RewardTrainer:
        args = args or settings(tmp_path)
        return RewardTrainer(model, args, processing_class=loaded.processor, train_dataset=data, **others)

    with pytest.raises(ValueError, match="args: expected RewardConfig, got PreferenceConfig"):
        made(args=PreferenceConfig(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="ref_model: a reward model is compared with no reference"):
        made(ref_model=loaded.model)
    with pytest.raises(DataError, match="facts: none of 8 records has answer; add the columns"):
        made(args=settings(tmp_path, facts=["answer", "caption"]))
    with pytest.raises(DataError, match=r"record odd: margin: expected a number, got '1'"):
        trainer = made(data=[{**data[0], "id": "odd", "margin": "1"}])
        trainer.train()
    with pytest.raises(DataError, match="record odd: options: expected a list of texts, got 'red'"):
        made(model=tiny(folder).model, args=settings(tmp_path, facts=FACTS), data=[{**data[0], "id": "odd", "options": "red"}])
    headless = get_peft_model(tiny(folder).model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="it has an adapter and no reward_head; merge the adapter"):
        made(model=headless)
    with pytest.raises(ValueError, match="a reward model has no use for the output head"):
        made(model=tiny(folder).model, peft_config=LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert isinstance(headless, PeftModel)
