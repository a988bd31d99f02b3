"""Which adapters training goes on with: they act in the layers, and with them off the model is the one that came."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import KasaConfig
from training_cases import config, preference_records, tiny
from transformers import TrainerCallback

from mmdpo_trainers.training import adapter_checks
from mmdpo_trainers.training.stopping import NoGradientError
from mmdpo_trainers.training.trainer import PreferenceTrainer

LINEARS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


def trainer_of(folder: Path, output: Path, adapter: Any = None, model: Any = None, **options: Any) -> PreferenceTrainer:
    loaded = tiny(folder, torch.float32)
    reference = options.pop("ref_model", None)
    return PreferenceTrainer(
        loaded.model if model is None else model,
        config(output, **options),
        processing_class=loaded.processor,
        train_dataset=preference_records(4),
        peft_config=adapter,
        ref_model=reference,
    )


REWRITING = {
    "init_lora_weights='pissa_niter_4'": {"init_lora_weights": "pissa_niter_4"},
    "init_lora_weights='olora'": {"init_lora_weights": "olora"},
    "kasa_config": {"kasa_config": KasaConfig()},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
}


@pytest.mark.parametrize("setting", list(REWRITING))
def test_an_adapter_that_rewrites_the_base_is_refused_by_its_setting(folder: Path, tmp_path: Path, setting: str) -> None:
    own = LoraConfig(r=2, target_modules=LINEARS, **REWRITING[setting])
    for options in ({}, {"precompute_ref_log_probs": True}):
        with pytest.raises(ValueError, match=f"adapter default: {setting} changes the model's own layers.*pass ref_model"):
            trainer_of(folder, tmp_path, own, **options)


def test_a_ready_made_model_of_that_kind_is_refused(folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(tiny(folder, torch.float32).model, LoraConfig(r=2, target_modules=LINEARS, init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="adapter default: init_lora_weights='pissa' changes"):
        trainer_of(folder, tmp_path, model=model)


def test_a_second_model_is_a_reference_for_any_adapter(folder: Path, tmp_path: Path) -> None:
    """PiSSA starts at the model itself, so policy and the model as it was loaded agree."""
    own = LoraConfig(r=2, target_modules=LINEARS, init_lora_weights="pissa")
    trainer = trainer_of(folder, tmp_path, own, ref_model=tiny(folder, torch.float32).model)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    # Neither does a loss that has no reference need the adapter off.
    trainer_of(folder, tmp_path, copy.deepcopy(own), loss_type=["nll"])


@pytest.mark.parametrize("setting", ["init_lora_weights='pissa_niter_4'", "kasa_config"])
def test_rewritten_weights_are_measured_whatever_the_setting(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """As if PEFT had a kind of adapter that nobody has listed."""
    monkeypatch.setattr(adapter_checks, "_rewriting", lambda config: None)
    own = LoraConfig(r=2, target_modules=LINEARS, **REWRITING[setting])
    with pytest.raises(ValueError, match="adapter default .LORA init_lora_weights=.*log-probabilities differ by .*load it again"):
        trainer_of(folder, tmp_path, own)


@pytest.mark.parametrize("ready_made", [True, False])
def test_what_is_trained_must_not_reach_the_reference(folder: Path, tmp_path: Path, ready_made: bool) -> None:
    """An adapter that is nothing at first, so that only a step shows what is left of it when it is off."""
    model = tiny(folder, torch.float32).model
    own = LoraConfig(r=2, target_modules=LINEARS)
    given: Any = get_peft_model(model, own) if ready_made else model
    gain = torch.nn.Parameter(torch.zeros(()))
    norm = model.model.language_model.norm
    norm.register_parameter("gain", gain)
    norm.register_forward_hook(lambda module, args, output: output * (1 + gain))
    if not ready_made:
        attach = peft.get_peft_model

        def attached(*args: Any, **options: Any) -> Any:
            found = attach(*args, **options)
            gain.requires_grad_(True)
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mmdpo_trainers.training.model_parts.get_peft_model", attached)
            with pytest.raises(ValueError, match="with it off, and its weights moved as training does"):
                trainer_of(folder, tmp_path, own, given)
        return
    with pytest.raises(ValueError, match="with it off, and its weights moved as training does"):
        trainer_of(folder, tmp_path, model=given)


FINE = {
    "rslora": LoraConfig(r=2, target_modules=LINEARS, use_rslora=True),
    "random": LoraConfig(r=2, target_modules=LINEARS, init_lora_weights=False),
    "dora": LoraConfig(r=2, target_modules=LINEARS, use_dora=True),
    "saved": LoraConfig(r=2, target_modules=LINEARS, modules_to_save=["multi_modal_projector"]),
    "loha": peft.LoHaConfig(r=2, target_modules=LINEARS),
    "ia3": peft.IA3Config(target_modules=LINEARS, feedforward_modules=["down_proj"]),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"], use_cayley_neumann=False),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),
}


@pytest.mark.parametrize("adapter", list(FINE))
def test_adapters_that_leave_the_base_are_taken_as_they_are(folder: Path, tmp_path: Path, adapter: str) -> None:
    own = copy.deepcopy(FINE[adapter])
    trainer = trainer_of(folder, tmp_path, own)
    torch.manual_seed(trainer.args.seed)
    plain = get_peft_model(tiny(folder, torch.float32).model, copy.deepcopy(FINE[adapter]))
    for (name, tensor), (other, expected) in zip(trainer.model.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other and torch.equal(tensor, expected), name


OUTSIDE = {
    "PROMPT_TUNING": peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "PREFIX_TUNING": peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "P_TUNING": peft.PromptEncoderConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "ADAPTION_PROMPT": peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"),
    "ADALORA": peft.AdaLoraConfig(target_modules=LINEARS, total_step=10),
    "POLY": peft.PolyConfig(target_modules=LINEARS),
    "alora_invocation_tokens": LoraConfig(r=2, target_modules=LINEARS, alora_invocation_tokens=[1]),
}


@pytest.mark.parametrize("kind", list(OUTSIDE))
def test_adapters_outside_of_the_layers_are_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match=f"adapter default: {kind} does .* in PEFT's own forward"):
        trainer_of(folder, tmp_path, copy.deepcopy(OUTSIDE[kind]), gradient_checkpointing=True)


NOISY = {
    "expected lora_dropout 0, got 0.1": LoraConfig(r=2, target_modules=LINEARS, lora_dropout=0.1),
    "expected module_dropout 0, got 0.2": peft.LoHaConfig(r=2, target_modules=LINEARS, module_dropout=0.2),
    "expected boft_dropout 0, got 0.3": peft.BOFTConfig(boft_block_size=4, target_modules=LINEARS, boft_dropout=0.3),
    "an adapter without noise, got one that samples": peft.PveraConfig(target_modules=LINEARS),
}


@pytest.mark.parametrize("message", list(NOISY))
def test_adapters_with_noise_are_refused(folder: Path, tmp_path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(folder, tmp_path, copy.deepcopy(NOISY[message]))


def test_a_model_with_an_earlier_trainers_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    model = tiny(folder, torch.float32).model
    first = trainer_of(folder, tmp_path, model=model)
    with pytest.raises(ValueError, match="model: it has an adapter in it already .at model.language_model.layers.0.*PeftModel"):
        trainer_of(folder, tmp_path, model=model)
    assert isinstance(first.model, PeftModel) and trainer_of(folder, tmp_path, model=first.model).model is first.model


def test_a_refused_adapter_leaves_the_model_as_it_was(folder: Path, tmp_path: Path) -> None:
    model = tiny(folder, torch.float32).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="output head"):
        trainer_of(folder, tmp_path, LoraConfig(r=2, target_modules=["lm_head"], use_dora=True), model)
    assert model.state_dict().keys() == before.keys()
    trainer_of(folder, tmp_path, LoraConfig(r=2, target_modules=LINEARS), model)


class Unmoved(TrainerCallback):
    """Fails where a step is taken."""

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        pytest.fail("a step was taken")


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("case", ["pictures", "weights"])
def test_training_without_a_gradient_stops_at_the_first_step(
    folder: Path, tmp_path: Path, checkpointing: bool, case: str
) -> None:
    """An adapter that no record reaches, or losses that count nothing."""
    vision = LoraConfig(r=2, target_modules=r".*vision_tower.*q_proj")
    options, own = ({"no_image": True}, vision) if case == "pictures" else ({"loss_weights": [0.0]}, None)
    trainer = trainer_of(folder, tmp_path, own, gradient_checkpointing=checkpointing, **options)
    trainer.add_callback(Unmoved())
    with pytest.raises(NoGradientError, match="step 1: all gradients are zero.*parameters are to be, such as base_model"):
        trainer.train()


def test_a_micro_batch_that_reaches_nothing_trained_is_no_error(folder: Path, tmp_path: Path) -> None:
    """One of a step's micro-batches has no picture, and only the vision tower has an adapter."""
    loaded = tiny(folder, torch.float32)
    records = preference_records(6)
    trainer = PreferenceTrainer(
        loaded.model,
        config(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2, train_sampling_strategy="sequential"),
        processing_class=loaded.processor,
        train_dataset=[records[5], records[0]],
        peft_config=LoraConfig(r=2, target_modules=r".*vision_tower.*q_proj"),
    )
    trainer.train()
    assert trainer.state.global_step == 1
