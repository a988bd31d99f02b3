"""Policy and reference differ by the weights only: whatever acts in training mode alone is off."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import config, preference_records, tiny

from mmdpo_trainers.training.trainer import PreferenceTrainer
from mmdpo_trainers.training.training_mode import disable_dropout, quiet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


class Noisy(nn.Module):
    """A module with what families do in training mode: jitter (Mixtral), stochastic depth, a batch norm, own dropout (Idefics)."""

    def __init__(self, inner: nn.Module, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = inner, kind
        self.norm = nn.BatchNorm1d(inner.in_features)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.training and self.kind == "jitter":
            hidden = hidden * torch.empty_like(hidden).uniform_(0.5, 1.5)
        if self.training and self.kind == "depth" and torch.rand(()) < 0.5:
            return hidden.new_zeros(*hidden.shape[:-1], self.inner.out_features)
        if self.kind == "batch norm":
            hidden = self.norm(hidden.flatten(0, -2)).view_as(hidden)
        return self.inner(hidden)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["jitter", "depth", "batch norm", "dropout"])
def test_noise_of_training_mode_reaches_neither_policy_nor_reference(
    folder: Path, tmp_path: Path, kind: str, checkpointing: bool
) -> None:
    """The first loss is log 2 whatever the noise, and one record's loss does not depend on those beside it."""
    loaded = tiny(folder, torch.float32)
    for layer in loaded.model.model.language_model.layers:
        if kind == "dropout":
            # A layer that checkpoints stays in training mode.
            layer.hidden_dropout = 0.5
            layer.register_forward_hook(_drops)
        else:
            layer.mlp.down_proj = Noisy(layer.mlp.down_proj, kind)
    trainer = PreferenceTrainer(
        loaded.model,
        config(tmp_path, gradient_checkpointing=checkpointing, lora_target=r".*q_proj"),
        processing_class=loaded.processor,
        train_dataset=preference_records(4),
    )
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    records = preference_records(3)
    whole, *alone = (
        trainer.compute_loss(trainer.model.train(), trainer.data_collator(each)).item()
        for each in (records, *([record] for record in records))
    )
    assert whole == pytest.approx(sum(alone) / 3, rel=1e-5)


def _drops(layer: Any, args: Any, output: Tensor) -> Tensor:
    return nn.functional.dropout(output, p=layer.hidden_dropout, training=layer.training)


def test_checkpointing_modules_and_pefts_stay_in_training(folder: Path, tmp_path: Path) -> None:
    loaded = tiny(folder, torch.float32)
    trainer = PreferenceTrainer(loaded.model, config(tmp_path, gradient_checkpointing=True), processing_class=loaded.processor)
    trainer.model.gradient_checkpointing_enable()
    quiet(trainer.model.train())
    training = {type(module).__name__ for module in trainer.model.modules() if module.training}
    assert {"LlamaDecoderLayer", "CLIPEncoderLayer", "PeftModelForCausalLM"} <= training
    assert not training & {"LlamaAttention", "LlamaMLP", "Dropout", "CLIPAttention", "CLIPMLP"}


def test_rates_of_noise_are_zero_by_whatever_name() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    for name in ("attention_dropout", "resid_pdrop", "layerdrop", "input_jitter_noise", "drop_path_rate"):
        setattr(module[0], name, 0.5)
    module[0].scale = 0.5
    disable_dropout(module)
    assert module[1].p == 0 and module[0].scale == 0.5
    assert not any(value for name, value in vars(module[0]).items() if isinstance(value, float) and name != "scale")
