"""The load-balancing loss of mixture-of-experts models in training: that of separate, unpatched sequences, as transformers and TRL have it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from routing import MOE_FAMILIES, transformers_loss, widen_modules
from tiny_models import TINY, make_tiny_llava
from training_cases import Gradients, config, preference_records, warm_adapter
from transformers import MixtralConfig, MixtralForCausalLM

from mmdpo_kernels import TokenTree, patch_model, tree_refusal
from mmdpo_trainers.models.families import family_of
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.training import model_parts, router_loss
from mmdpo_trainers.training.batches.collator import model_collator
from mmdpo_trainers.training.reward.config import RewardConfig
from mmdpo_trainers.training.router_loss import RouterLoss
from mmdpo_trainers.training.trainer import PreferenceTrainer

RECORDS = [{**record, "region": None, "patch_grid": None} for record in preference_records(6)]
FULL = {"full_finetune": True, "freeze_vision": False, "freeze_projector": False}


@pytest.fixture(scope="module", params=MOE_FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY[request.param](tmp_path_factory.mktemp(request.param) / "model", experts=8)


# What does not differ by family is run on one of them.
_SOME = [name if name == MOE_FAMILIES[0] else pytest.param(name, marks=pytest.mark.nightly) for name in MOE_FAMILIES]


@pytest.fixture(scope="module", params=_SOME)
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY[request.param](tmp_path_factory.mktemp(request.param) / "model", experts=8)


def load(folder: Path) -> LoadedModel:
    return load_model(folder, dtype=torch.float64, device="cpu")


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-9) -> None:
    """All gradients, each in the size of its largest entry, or of a thousandth of the largest of all."""
    least = 1e-3 * max(float(gradient.abs().max()) for gradient in expected.values())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        size = max(float(gradient.abs().max()), least)
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=tolerance * size, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("packing", [True, False])
def test_it_is_that_of_separate_unpatched_sequences(folder: Path, packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradients of all weights, against transformers' whole model on the padded rows of all branches, each with its pictures."""
    loaded = load(folder)
    plain = copy.deepcopy(loaded.model)
    if packing and tree_refusal(plain) is not None:
        pytest.skip(f"trees are not exact with this transformers: {tree_refusal(plain)}")
    widen_modules(plain, monkeypatch)
    family = family_of(plain)
    collators = {each: model_collator(plain, loaded.processor, tree_packing=each) for each in (True, False)}
    rows = collators[False](RECORDS)["batch"]
    shown = [image for record in RECORDS for _ in range(2) for image in record["images"]]
    counts = [len(record["images"]) for record in RECORDS for _ in range(2)]
    pictures = family.encode_images(loaded.processor, shown, [count == 1 for count in counts for _ in range(count)])
    places = torch.arange(len(shown)).split(counts)
    inputs = family.model_inputs(pictures, [each.tolist() for each in places], rows.input_ids)
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    assert (rows.attention_mask == 0).any()
    output = plain.base_model(
        input_ids=rows.input_ids, attention_mask=rows.attention_mask, output_router_logits=True, use_cache=False, **inputs
    )
    text = plain.config.get_text_config()
    expected = transformers_loss(output.router_logits, text.num_experts, text.num_experts_per_tok, rows.attention_mask)
    expected.backward()

    model = patch_model(loaded.model).train()
    batch = collators[packing](RECORDS)["batch"]
    if packing:
        assert batch.input_ids.numel() < 0.7 * int(rows.attention_mask.sum())
    with RouterLoss(model).taken(batch.sequence_counts) as taken:
        hidden = model_parts.hidden_states(model, batch, model_parts.image_features(model, batch))
    _, found = taken.beside(hidden)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    found.backward()
    assert_equal(gradients(model), gradients(plain))


def test_it_is_that_of_separate_sequences_of_a_text_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Branches within branches, a sequence that ends inside of another, and one twice."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
    experts = {"num_local_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 3}
    plain = MixtralForCausalLM(MixtralConfig(**sizes, **experts, initializer_range=0.3)).double().eval()
    plain.set_experts_implementation("eager")
    widen_modules(plain, monkeypatch)
    model = patch_model(copy.deepcopy(plain))
    sequences = [[1, 2, 3, 4, 9], [1, 2, 3, 5, 6], [1, 2, 3], [1, 2], [1, 2], [7, 8, 9, 10, 11, 12, 13]]
    width = max(map(len, sequences))
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in sequences])
    ids = torch.tensor([row + [0] * (width - len(row)) for row in sequences])
    output = plain.model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
    expected = transformers_loss(output.router_logits, 6, 2, mask)
    expected.backward()

    tree = TokenTree.from_sequences(sequences, prompt_lengths=[1] * len(sequences))
    with RouterLoss(model).taken(tree.sequence_counts) as taken:
        hidden = model.model(
            input_ids=tree.input_ids[None],
            position_ids=tree.position_ids[None],
            attention_mask=tree.attention_mask,
            use_cache=False,
        ).last_hidden_state
    _, found = taken.beside(hidden)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    found.backward()
    assert_equal(gradients(model), gradients(plain))


def train(folder: Path, output: Path, *, peft: LoraConfig | None = None, **options: Any) -> tuple[PreferenceTrainer, Gradients]:
    """A step over six records in two micro-batches."""
    loaded, found = load(folder), Gradients()
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, **options}
    trainer = PreferenceTrainer(
        loaded.model,
        config(output, **options),
        processing_class=loaded.processor,
        train_dataset=RECORDS,
        eval_dataset=RECORDS[:5],
        peft_config=peft,
        callbacks=[found],
    )
    if peft is not None:
        warm_adapter(trainer)
    trainer.train()
    return trainer, found


CHECKPOINTED = [
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": each}} for each in (False, True)
]
# Away from its start, so that a reference with a part in the loss would show.
ATTENTION = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
EXPERTS = {**ATTENTION, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]}


@pytest.mark.parametrize("lora", [None, ATTENTION, EXPERTS], ids=["full", "attention", "experts"])
def test_training_adds_a_mean_over_micro_batches(
    one: Path, tmp_path: Path, lora: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the policy's rows, packed, padded and with both kinds of gradient checkpointing."""
    widen_modules(load(one).model, monkeypatch)
    options: dict[str, Any] = {"peft": LoraConfig(**lora)} if lora else FULL
    without, _ = train(one, tmp_path, router_aux_loss_coef=0.0, **options)
    trainer, packed = train(one, tmp_path, router_aux_loss_coef=0.5, **options)
    entry, plain = trainer.state.log_history[0], without.state.log_history[0]
    assert "aux_loss" not in plain and entry["loss"] == pytest.approx(plain["loss"] + 0.5 * entry["aux_loss"], rel=1e-6)
    for variant in ({"tree_packing": False}, *CHECKPOINTED):
        other, found = train(one, tmp_path, router_aux_loss_coef=0.5, **options, **variant)
        for name in ("loss", "aux_loss", "rewards/chosen", "logps/rejected"):
            assert other.state.log_history[0][name] == pytest.approx(entry[name], rel=1e-6, abs=1e-12), name
        assert_equal(found.steps[0], packed.steps[0])


def test_the_mean_is_of_micro_batches(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by itself against transformers, in training and in evaluation, whose batches are of other sizes."""
    widen_modules(load(one).model, monkeypatch)
    trainer, _ = train(one, tmp_path, router_aux_loss_coef=0.5, learning_rate=0.0, train_sampling_strategy="sequential", **FULL)
    text = trainer.model.config.get_text_config()
    collator = model_collator(trainer.model, load(one).processor, tree_packing=False)

    def alone(records: list[dict[str, Any]]) -> float:
        batch = collator(records)["batch"]
        features = model_parts.image_features(trainer.model, batch)
        logits = []
        hooks = [
            module.register_forward_hook(lambda _, args, output: logits.append(output[0]))
            for module, _ in router_loss.routers(trainer.model)
        ]
        with torch.no_grad():
            model_parts.hidden_states(trainer.model, batch, features)
        for hook in hooks:
            hook.remove()
        return float(transformers_loss(tuple(logits), text.num_experts, text.num_experts_per_tok, batch.attention_mask))

    expected = (alone(RECORDS[:3]) + alone(RECORDS[3:])) / 2
    assert trainer.state.log_history[0]["aux_loss"] == pytest.approx(expected, rel=1e-6)
    metrics = trainer.evaluate()
    assert metrics["eval_aux_loss"] == pytest.approx((alone(RECORDS[:4]) + alone(RECORDS[4:5])) / 2, rel=1e-9)
    # Policy and reference agree, so the other loss is log 2.
    assert metrics["eval_loss"] == pytest.approx(0.5 * metrics["eval_aux_loss"] + 0.6931471805599453, rel=1e-6)


def test_the_model_configuration_is_the_default_and_hooks_are_quiet_afterwards(one: Path, tmp_path: Path) -> None:
    trainer, _ = train(one, tmp_path, learning_rate=0.0, **FULL)
    assert trainer.router_aux_loss_coef == trainer.model.config.get_text_config().router_aux_loss_coef > 0
    assert trainer.state.log_history[0]["aux_loss"] > 0
    fresh, ids = load(one).model, torch.tensor([[9, 10, 11, 12]])
    for model in (trainer.model, fresh):
        model.zero_grad()
        model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
    assert_equal(gradients(trainer.model), gradients(fresh), 1e-12)
    copied = copy.deepcopy(trainer.model)
    assert torch.equal(copied(input_ids=ids, use_cache=False).logits, fresh(input_ids=ids, use_cache=False).logits)


def test_it_is_trls(one: Path, tmp_path: Path) -> None:
    """Loss, `aux_loss` and norm of the gradient of a step on six records, in float32, against TRL's DPOTrainer."""
    trl = pytest.importorskip("trl", reason="TRL is a peer, installed with the extra `peers`")
    from datasets import Dataset, Image, List

    if not hasattr(load(one).model.config.get_text_config(), "output_router_logits"):
        pytest.skip(
            "TRL takes the loss where the text configuration has output_router_logits, which it has not in this transformers"
        )
    records = [{name: r[name] for name in ("prompt", "chosen", "rejected", "images")} for r in RECORDS if len(r["images"]) == 1]
    for index, record in enumerate(records):
        path = tmp_path / f"{index}.png"
        record["images"][0].save(path)
        record["images"] = [str(path)]
        record["prompt"] = [{"role": "user", "content": record["prompt"][0]["content"].replace("<image>\n", "")}]
    shared = {"max_steps": 1, "per_device_train_batch_size": len(records), "router_aux_loss_coef": 0.5, "max_grad_norm": 1e9}
    shared |= {
        "output_dir": str(tmp_path / "out"),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }
    theirs, ours = load_model(one, dtype=torch.float32, device="cpu"), load_model(one, dtype=torch.float32, device="cpu")
    for each in (theirs, ours):
        # TRL trains the line end that the template writes behind a turn, too.
        tokenizer = each.processor.tokenizer
        tokenizer.chat_template = each.processor.chat_template = tokenizer.chat_template.replace("'<|im_end|>\n'", "'<|im_end|>'")
    peer = trl.DPOTrainer(
        model=theirs.model,
        args=trl.DPOConfig(**shared, bf16=False, max_length=None, gradient_checkpointing=False),
        train_dataset=Dataset.from_list(records).cast_column("images", List(Image())),
        processing_class=theirs.processor,
    )
    peer.train()
    mine = [{**r, "prompt": [{"role": "user", "content": "<image>" + r["prompt"][0]["content"]}]} for r in records]
    options = {name: value for name, value in shared.items() if name != "output_dir"}
    trainer = PreferenceTrainer(
        ours.model, config(tmp_path / "ours", **options, **FULL), processing_class=ours.processor, train_dataset=mine
    )
    trainer.train()
    for name in ("loss", "aux_loss", "grad_norm", "logps/chosen"):
        assert trainer.state.log_history[0][name] == pytest.approx(peer.state.log_history[0][name], rel=2e-5), name


def test_what_has_no_such_loss_is_named(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = load(make_tiny_llava(tmp_path / "dense"))

    def trainer(loaded: LoadedModel, **options: Any) -> PreferenceTrainer:
        return PreferenceTrainer(
            loaded.model, config(tmp_path, **options), processing_class=loaded.processor, train_dataset=preference_records(1)
        )

    expected = "router_aux_loss_coef: expected a mixture-of-experts model that has a load-balancing loss, got 0.01 for "
    with pytest.raises(
        ValueError, match=re.escape(f"{expected}LlavaForConditionalGeneration: its layers have no experts; leave it out")
    ):
        trainer(dense, router_aux_loss_coef=0.01)
    assert trainer(dense).router_aux_loss_coef == 0
    with pytest.raises(
        ValueError, match="router_aux_loss_coef: a compiled model's routers .* 0.001, of the model configuration; set it"
    ):
        trainer(load(one), torch_compile=True)
    assert trainer(load(one), torch_compile=True, router_aux_loss_coef=0.0).router_aux_loss_coef == 0

    loaded = load(one)
    monkeypatch.setattr(type(loaded.model.get_decoder()), "_can_record_outputs", {})
    with pytest.raises(ValueError, match="router_aux_loss_coef: .* transformers does not record its routers; leave it out"):
        trainer(loaded, router_aux_loss_coef=0.01)
    assert trainer(load(one)).router_aux_loss_coef == 0


@pytest.mark.parametrize("value", [-1.0, float("nan"), "much", True])
def test_a_coefficient_is_a_number(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="router_aux_loss_coef: expected a number of 0 or more, or None, got"):
        config(tmp_path, router_aux_loss_coef=value)


def test_reward_models_have_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"router_aux_loss_coef: a reward model has no load-balancing loss, as in TRL, got 0\.1"):
        config(tmp_path, kind=RewardConfig, router_aux_loss_coef=0.1)
    assert config(tmp_path, kind=RewardConfig).router_aux_loss_coef == 0
