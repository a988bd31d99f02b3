"""Where the chosen response looks as an objective: value and gradient are those of eager attention maps, whatever is packed or recomputed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_llava, make_tiny_qwen, sample_pictures
from torch import Tensor, nn
from training_cases import config, preference_records, tiny, warm_adapter

from mmdpo_kernels import SequencePaths, patch_model, record_path_maps, unpatch_model
from mmdpo_trainers.checks.baseline import _continued, processor_inputs
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.models.token_rules import response_end
from mmdpo_trainers.training import model_parts
from mmdpo_trainers.training.attention_target import target_losses
from mmdpo_trainers.training.batches.attention_targets import AttentionTargets
from mmdpo_trainers.training.trainer import PreferenceTrainer

LAYER = 1
FULL = {"full_finetune": True, "freeze_vision": False, "freeze_projector": False}
ALONE: dict[str, Any] = {"loss_type": ["nll"], "loss_weights": [0.0], "attention_target_layer": LAYER}
"""The objective and nothing else."""


@pytest.fixture(autouse=True)
def float64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes norms and eager softmax in float32."""
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

    softmax = nn.functional.softmax

    def norm(self: Any, hidden_states: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim=-1, dtype=None, **options: softmax(x, dim=dim))
    for module in (modeling_llama, modeling_qwen2_5_vl):
        for name in dir(module):
            if name.endswith("RMSNorm"):
                monkeypatch.setattr(getattr(module, name), "forward", norm)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def model_of(make: Any, folder: Path) -> LoadedModel:
    path = folder / make.__name__
    if not path.exists():
        make(path)
    return load_model(path, dtype=torch.float64, device="cpu")


def records() -> list[dict[str, Any]]:
    """Several pictures, two of them about the same pictures with other targets; without a target: one picture, and none."""
    found = preference_records(6, [picture.resize((48, 48)) for picture in sample_pictures(6)])
    for record in found:
        record.update(region=None, patch_grid=None)
    first = found[0]
    again = {**first, "id": "again", "target": 1 - first["target"], "chosen": [{"role": "assistant", "content": "two"}]}
    return [first, found[1], again, found[4], found[5]]


def eager_losses(loaded: LoadedModel, model: nn.Module, form: str, cases: list[dict[str, Any]], size: int) -> list[Tensor]:
    """From the maps of each sequence by itself; size: image tokens of a picture."""
    found = []
    for record in cases:
        if len(record["images"]) < 2:
            continue
        response = loaded.texts.answer(record["id"], "chosen", record["chosen"][0]["content"])
        ids = torch.tensor([[*response, response_end(loaded.processor, loaded.model.generation_config)]])
        inputs = _continued(processor_inputs(loaded, record["prompt"][0]["content"], record["images"]), ids)
        rows = slice(-ids.shape[1] - 1, -1)
        attention = model(**inputs, output_attentions=True, use_cache=False).attentions[LAYER][0].mean(0)[rows].mean(0)
        on_pictures = attention[inputs["input_ids"][0] == loaded.image_token_id].view(len(record["images"]), size)
        p = on_pictures[record["target"]] / on_pictures.sum()
        if form == "log_share":
            found.append(-p.sum().log())
        elif form == "sayo":
            found.append(1 - (1 + torch.tanh(torch.log(p.sum() * len(record["images"])))) / 2)
        else:
            found.append((torch.log(1 / size / p) / size).sum())
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    model.zero_grad()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name in found.keys() | expected.keys():
        # What one of them has no gradient of, the other has only rounding of.
        mine, theirs = (each.get(name, torch.zeros(())) for each in (found, expected))
        torch.testing.assert_close(*torch.broadcast_tensors(mine, theirs), rtol=1e-8, atol=1e-10 * scale, check_dtype=False)


@pytest.mark.parametrize("form", ["log_share", "sayo", "kl"])
@pytest.mark.parametrize("make, options", [(make_tiny_llava, FULL), (make_tiny_llava, {}), (make_tiny_qwen, {})])
def test_gradient_is_autograds_through_eager_maps(folder: Path, tmp_path: Path, make: Any, options: Any, form: str) -> None:
    losses, found = [], []
    for packing in (True, False):
        loaded = model_of(make, folder)
        settings = config(
            tmp_path / str(packing), tree_packing=packing, attention_target=form, attention_target_weight=0.7, **ALONE, **options
        )
        trainer = PreferenceTrainer(loaded.model, settings, processing_class=loaded.processor)
        warm_adapter(trainer)
        loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator(records()))
        loss.backward()
        losses.append(loss.item())
        found.append(gradients(trainer.model))
        log = trainer._averages["train"].take()
        assert log["attn/targeted"] == pytest.approx(3 / 5)
        assert 0.7 * log["attn/target_loss"] == pytest.approx(loss.item(), rel=1e-9)
        if form == "log_share" and packing:
            assert 0 < log["attn/target_share"] < 1
    base = model_parts.base_of(trainer.model)
    unpatch_model(trainer.model)
    base.set_attn_implementation("eager")
    batch = trainer.data_collator.batch(records())
    size = batch.pictures.tokens[0]
    expected = 0.7 * torch.stack(eager_losses(loaded, trainer.model, form, records(), size)).mean()
    expected.backward()
    assert losses == pytest.approx([expected.item()] * 2, rel=1e-9)
    eager = gradients(trainer.model)
    for each in found:
        assert_same(each, eager)


@pytest.mark.parametrize("options", [{}, FULL])
def test_recomputed_layers_change_nothing(folder: Path, tmp_path: Path, options: Any) -> None:
    found = []
    for name, checkpointing in (("plain", {}), ("recomputed", {"gradient_checkpointing": True, "activation_offloading": True})):
        loaded = tiny(folder / "llava")
        settings = config(
            tmp_path / name,
            attention_target="log_share",
            **{**ALONE, "loss_weights": [0.3]},
            **options,
            **checkpointing,
            **({"gradient_checkpointing_kwargs": {"use_reentrant": False}} if checkpointing else {}),
            attention_layer=0,
        )
        trainer = PreferenceTrainer(loaded.model, settings, processing_class=loaded.processor, train_dataset=records())
        if checkpointing:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        warm_adapter(trainer)
        loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator(records()))
        loss.backward()
        found.append((loss.item(), gradients(trainer.model), trainer._averages["train"].take()))
    assert found[0][0] == found[1][0] and found[0][2] == found[1][2]
    # Ratios of another layer are recorded beside it.
    assert "attn/ratio_sequence" in found[0][2]
    assert_same(found[1][1], found[0][1])


def test_re_entrant_checkpointing_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attention_target: re-entrant checkpointing runs layers without a gradient"):
        config(
            tmp_path,
            attention_target="kl",
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
            **ALONE,
        )
    loaded = tiny(folder / "llava")
    trainer = PreferenceTrainer(loaded.model, config(tmp_path, attention_target="kl", **ALONE), processing_class=loaded.processor)
    trainer.model.enable_input_require_grads()
    trainer.model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="attention of layer 1 carries no gradient: .*use_reentrant=True"):
        trainer.compute_loss(trainer.model.train(), trainer.data_collator(records()))


def test_micro_batches_add_up_and_evaluation_has_it(folder: Path, tmp_path: Path) -> None:
    """The mean is over the step's records with a target, however these fall into micro-batches."""
    logs = []
    for size in (1, 5):
        loaded = tiny(folder / "llava")
        settings = config(
            tmp_path / str(size),
            attention_target="log_share",
            attention_layer=LAYER,
            per_device_train_batch_size=size,
            per_device_eval_batch_size=size,
            gradient_accumulation_steps=5 // size,
            max_steps=2,
            loss_type=["sigmoid", "nll"],
        )
        trainer = PreferenceTrainer(
            loaded.model, settings, processing_class=loaded.processor, train_dataset=records(), eval_dataset=records()
        )
        warm_adapter(trainer)
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry] + [trainer.evaluate()])
    for one, other in zip(*logs, strict=True):
        # Of pictures that records of a micro-batch share the logged ratio counts the first record's alone.
        shared = {name for name in one if not name.endswith(("runtime", "per_second", "ratio_sequence"))}
        assert {name: one[name] for name in shared} == pytest.approx({name: other[name] for name in shared}, rel=1e-6, abs=1e-9)
    assert logs[0][1]["attn/target_loss"] < logs[0][0]["attn/target_loss"], "what is trained on goes down"
    last = logs[0][2]
    parts = last["eval_nll_loss"] + last["eval_attn/target_loss"]
    assert 0 < last["eval_loss"] - parts < 2, "the rest is the pairwise loss"


def targets_of(pictures: list[int], target: list[int]) -> AttentionTargets:
    places = torch.arange(6)
    return AttentionTargets(
        records=[0],
        tokens=places[None],
        rows=torch.tensor([[5]]),
        pictures=torch.isin(places, torch.tensor(pictures))[None],
        target=torch.isin(places, torch.tensor(target))[None],
    )


def test_values_in_closed_form() -> None:
    targets = targets_of([1, 2, 3, 4], [1, 2])
    even = torch.tensor([[0.2, 0.1, 0.1, 0.1, 0.1, 0.4]], dtype=torch.float64)
    values = {form: target_losses(form, even, targets)[0].item() for form in ("log_share", "sayo", "kl")}
    assert values == pytest.approx({"log_share": math.log(2), "sayo": 0.5, "kl": math.log(2)})
    there = torch.tensor([[0.2, 0.3, 0.3, 0.0, 0.0, 0.2]], dtype=torch.float64)
    values = {form: target_losses(form, there, targets)[0].item() for form in ("log_share", "sayo", "kl")}
    assert values == pytest.approx({"log_share": 0.0, "sayo": 1 / 5, "kl": 0.0}, abs=1e-12)
    uneven = torch.tensor([[0.2, 0.5, 0.1, 0.0, 0.0, 0.2]], dtype=torch.float64)
    assert target_losses("kl", uneven, targets)[0].item() == pytest.approx(0.5 * math.log(0.5 / (5 / 6)) + 0.5 * math.log(3))
    nothing = torch.tensor([[0.5, 0.0, 0.0, 0.0, 0.0, 0.5]], dtype=torch.float64, requires_grad=True)
    for form in ("log_share", "sayo", "kl"):
        loss, share = target_losses(form, nothing, targets)
        assert loss.item() == 0 and share.isnan().all()
        (gradient,) = torch.autograd.grad(loss.sum(), nothing)
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"attention_target": "share"}, "attention_target: expected one of log_share, sayo, kl, got 'share'"),
        ({"attention_target": "kl"}, "it needs a layer; set attention_target_layer, or attention_layer"),
        ({"attention_target": "kl", "attention_layer": 1, "no_image": True}, "there is nothing to look at"),
        (
            {"attention_target": "kl", "attention_layer": 1, "torch_compile": True},
            "recorded without a gradient; leave torch_compile out",
        ),
        (
            {"attention_target": "kl", "attention_layer": 1, "attention_target_weight": math.inf},
            "attention_target_weight: expected",
        ),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_what_cannot_be_recorded(folder: Path) -> None:
    model = patch_model(tiny(folder / "llava").model)
    paths = SequencePaths(torch.arange(4)[None], torch.tensor([[2, 3]]))
    with pytest.raises(ValueError, match="layer must be one of the model's 3, got 3"), record_path_maps(model, paths, layer=3):
        pass
    with record_path_maps(model, paths, layer=1) as maps:
        with pytest.raises(ValueError, match="already being recorded"), record_path_maps(model, paths, layer=1):
            pass
        with pytest.raises(ValueError, match="layer 1 has not run"):
            _ = maps.maps
    with pytest.raises(ValueError, match="attention_target_layer: expected 0 to 2"):
        loaded = tiny(folder / "llava")
        PreferenceTrainer(
            loaded.model, config(folder, attention_target="kl", attention_target_layer=7), processing_class=loaded.processor
        )
