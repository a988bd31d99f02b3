"""The trainer on a family whose layers carry a state: LoRA on their projections through packed trees, and settings that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_qwen3_5
from training_cases import Gradients, config, preference_records, warm_adapter
from transformers import Cache
from wide_kernels import widen_kernels

from mmdpo_kernels import tree_refusal
from mmdpo_trainers.answers.attention_ratios import check_layer, resolve_layer
from mmdpo_trainers.errors import StageError
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.training.trainer import PreferenceTrainer

MDPO = ["sigmoid", "copo", "ancpo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3_5(tmp_path_factory.mktemp("qwen3_5") / "model")


def trainer(folder: Path, output: Path, **options: Any) -> PreferenceTrainer:
    loaded = load_model(folder, dtype=torch.float64, device="cpu")
    return PreferenceTrainer(
        loaded.model, config(output, **options), processing_class=loaded.processor, train_dataset=preference_records(4)
    )


@pytest.mark.skipif(not hasattr(Cache, "get_conv_state"), reason="transformers before 5.22: trees are refused")
def test_packed_steps_are_those_of_padded_rows(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An mDPO step of LoRA on every projection, with gradient checkpointing, whose recomputation needs the tree again."""
    widen_kernels(monkeypatch, "qwen3_5")
    found = {}
    for packing in (True, False):
        made = trainer(folder, tmp_path / str(packing), loss_type=MDPO, tree_packing=packing, gradient_checkpointing=True)
        warm_adapter(made)
        gradients = Gradients()
        made.add_callback(gradients)
        made.train()
        assert made.data_collator.tree_packing is packing
        found[packing] = made.state.log_history[0]["loss"], gradients.steps[0]
    (loss, tree), (expected, rows) = found[True], found[False]
    assert loss == pytest.approx(expected, rel=1e-9)
    assert {name.split(".")[-4] for name in tree} >= {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "q_proj"}
    for name, gradient in rows.items():
        assert bool(gradient.abs().max() > 0), name
        torch.testing.assert_close(tree[name], gradient, rtol=1e-8, atol=1e-9 * float(gradient.abs().max()), msg=name)


def test_layers_that_attend_and_those_that_do_not(folder: Path, tmp_path: Path) -> None:
    loaded = load_model(folder, device="cpu")
    assert list(loaded.image_layers) == [3] and resolve_layer(loaded.image_layers) == 3
    # 16 of 32 carries a state: the nearest one that attends.
    assert resolve_layer(list(range(3, 32, 4))) == 15 and resolve_layer(range(32)) == 16
    with pytest.raises(StageError, match=r"score.layer: expected one of \[3\], which see pictures, for this model, got 1"):
        check_layer(loaded.image_layers, 1)
    with pytest.raises(ValueError, match=r"attention_layer: expected one of \[3\], which see pictures, got 1"):
        trainer(folder, tmp_path, attention_layer=1)
    with pytest.raises(ValueError, match="'mask' hides image tokens.*layers of linear_attention carry every token on"):
        trainer(folder, tmp_path, loss_type=MDPO, corruption="mask")
    assert (tree_refusal(loaded.model) is None) == hasattr(Cache, "get_conv_state")
