"""Training steps of models whose pictures or prompts see themselves both ways: a packed tree gives what padded rows give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY, make_tiny_gemma3, sample_pictures
from torch import Tensor
from training_cases import config, preference_records, warm_adapter

from mmdpo_kernels import TokenTree, patch_model
from mmdpo_trainers.models.families import tree_refusal
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.training.batches.collator import PreferenceCollator
from mmdpo_trainers.training.batches.packing import batch_tokens, measure
from mmdpo_trainers.training.trainer import PreferenceTrainer

LOSSES: dict[str, Any] = {"loss_type": ["sigmoid", "copo", "ancpo"], "loss_weights": [1.0, 1.0, 1.0]}


def records() -> list[dict[str, Any]]:
    """Two pictures, asked about twice, one, three, and none."""
    found = preference_records(6, sample_pictures(6))
    for record in found:
        record.update(region=None, patch_grid=None)
    again = {**found[0], "id": "again", "target": 0, "prompt": [{"role": "user", "content": "<image><image> is there a star ?"}]}
    return [found[0], again, found[1], found[2], found[5]]


def step(folder: Path, output: Path, *, packing: bool, **options: Any) -> tuple[float, dict[str, Tensor], dict[str, float], int]:
    """Loss, gradients, log and tokens of one micro-batch."""
    loaded = load_model(folder, dtype=torch.float64, device="cpu")
    trainer = PreferenceTrainer(
        loaded.model,
        config(output, tree_packing=packing, attention_layer=1, **LOSSES, **options),
        processing_class=loaded.processor,
    )
    warm_adapter(trainer)
    batch = trainer.data_collator(records())
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    tree = batch["batch"]
    assert (tree.attention_mask.ndim == 4) == packing and isinstance(trainer.data_collator, PreferenceCollator)
    if packing:
        every = range(len(records()))
        sizes = measure(records(), trainer.data_collator, every)
        assert tree.input_ids.shape[1] <= batch_tokens(every, sizes.lengths, sizes.groups, sizes.shared)
    return loss.item(), gradients, trainer._averages["train"].take(), int((tree.attention_mask != 0).sum()) if not packing else 0


@pytest.mark.parametrize("corruption", ["crop", "mask"])
@pytest.mark.parametrize("family", ["gemma3", "gemma4", "paligemma", "paligemma2"])
def test_a_packed_step_is_the_padded_one(family: str, corruption: str, tmp_path: Path) -> None:
    """mDPO's losses, an attention objective, recorded ratios; image tokens of the corrupted branch hidden, or another picture in its place."""
    folder = TINY[family](tmp_path / "model")
    options: dict[str, Any] = {"corruption": corruption, "attention_target": "log_share", "attention_target_weight": 0.5}
    packed, padded = (step(folder, tmp_path / name, packing=name == "tree", **options) for name in ("tree", "rows"))
    assert packed[0] == pytest.approx(padded[0], rel=1e-6)
    scale = max(float(gradient.abs().max()) for gradient in padded[1].values())
    assert packed[1].keys() == padded[1].keys() and scale > 0
    for name, gradient in padded[1].items():
        torch.testing.assert_close(packed[1][name], gradient, rtol=0, atol=2e-6 * scale)
    assert any(name.startswith("attn/ratio") for name in padded[2]) and "attn/target_loss" in padded[2]
    for name, value in padded[2].items():
        if name.startswith(("attn/", "rewards/", "logps/")):
            assert packed[2][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_a_tree_without_reach_is_refused_and_texts_need_none(tmp_path: Path) -> None:
    model = load_model(make_tiny_gemma3(tmp_path / "model"), dtype=torch.float64, device="cpu").model
    assert tree_refusal(model) is None
    ids = [[2, 20, 21, 30], [2, 20, 21, 31, 32]]
    plain = TokenTree.from_sequences(ids, prompt_lengths=[3, 3])
    blocks = [torch.full((len(row),), -1).numpy() for row in ids]
    text = TokenTree.from_sequences(ids, prompt_lengths=[3, 3], blocks=blocks)
    patch_model(model)

    def logits(tree: TokenTree) -> Tensor:
        return model(
            input_ids=tree.input_ids[None], attention_mask=tree.attention_mask, position_ids=tree.position_ids[None]
        ).logits[0]

    with torch.no_grad():
        with pytest.raises(ValueError, match=r"see each other both ways; pack it with TokenTree.from_sequences\(blocks=...\)"):
            logits(plain)
        found = logits(text)
        for row, path in zip(ids, text.paths, strict=True):
            torch.testing.assert_close(found[path], model(input_ids=torch.tensor([row])).logits[0], rtol=1e-6, atol=1e-8)


def test_shared_keys_need_checkpointing_that_is_not_re_entrant(tmp_path: Path) -> None:
    """Layers that take keys and values of earlier ones: no gradient would come back through them."""
    loaded = load_model(TINY["gemma4"](tmp_path / "model"), device="cpu")
    settings = config(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="gradient_checkpointing_kwargs: re-entrant checkpointing gives no gradient to keys"):
        PreferenceTrainer(loaded.model, settings, processing_class=loaded.processor)
