"""The products that the training-step benchmark counts are those that PyTorch's counter sees, on both sides."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.runs.training_step import limits
from benchmarks.runs.training_step.setting import SMALL, Setting
from benchmarks.runs.training_step.sides import MDPO, Side, make, ours, warm

SIZES = SMALL.but(layers=2, vision_layers=3, lora_r=3, mlp=48, vision_mlp=32)
CASES = {
    "TRL": (Side(kind="trl", batch=2), SIZES),
    "official": (Side(kind="official"), SIZES.but(corrupted=True)),
    "official rows": (Side(kind="official rows"), SIZES.but(corrupted=True)),
    "ours": (ours(loss_type=MDPO, mlp_chunk_rows=8), SIZES.but(corrupted=True)),
    "questions": (ours(batch=2, group_by_pictures=True), SIZES.but(questions=2)),
    "apart": (Side(kind="ours", options={"own_vision": True, "tree_packing": False}), SIZES),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_products_are_those_that_pytorch_counts(name: str, checkpointing: bool) -> None:
    """But for attention, which the counter does not know on CPUs, and the head where it is an op of ours."""
    if name == "TRL":
        pytest.importorskip("trl", reason="TRL is a peer, installed with the [peers] extra")
    side, setting = CASES[name]
    side = Side(kind=side.kind, batch=side.batch, checkpointing=checkpointing, options=side.options)
    trainer = make(side, setting)
    if side.kind == "ours":
        trainer.precompute_reference()  # type: ignore[attr-defined]
    if checkpointing:
        trainer.model.gradient_checkpointing_enable()  # type: ignore[union-attr, operator]
    warm(trainer.model)  # type: ignore[arg-type]
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(side.batch)])  # type: ignore[index]
    with FlopCounterMode(display=False) as counter:
        trainer.compute_loss(trainer.model.train(), batch).backward()  # type: ignore[union-attr]
    kinds = [limits.by_kind(each, setting) for each in limits.passes(trainer, side)]
    counted = ("linears",) if side.kind == "ours" else ("linears", "head")
    assert counter.get_total_flops() == sum(found[kind] for found in kinds for kind in counted)
    assert all(min(found.values()) > 0 for found in kinds)


def test_attention_is_counted_by_pairs() -> None:
    """A dense attention of S tokens has S² of them; a causal one, and a tree, the pairs that its rule lets see each other."""
    query = torch.randn(1, 2, 6, 4, requires_grad=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        scaled_dot_product_attention(query, query * 2, query * 3).sum().backward()
    both = limits.attention(36, 8) + limits.attention(36, 8, backward=True)
    assert counter.get_total_flops() == both
    for side in (Side(kind="trl"), Side(kind="ours", options={"tree_packing": False})):
        found = limits.passes(make(side, SIZES), side)[0]
        assert found.pairs == 2 * sum(range(found.rows // 2 + 1))
    side = ours()
    trainer = make(side, SIZES)
    ends = trainer.data_collator([trainer.train_dataset[0]])["batch"].attention_mask[0, 0, 0].tolist()  # type: ignore[index]
    seen = sum(key <= query < end for key, end in enumerate(ends) for query in range(len(ends)))
    assert limits.passes(trainer, side)[0].pairs == seen


def test_a_cached_reference_costs_its_share() -> None:
    side, setting = ours(batch=2), SIZES
    trainer = make(side, setting)
    [policy] = limits.passes(trainer, side)
    alone = limits.Pass(
        rows=policy.rows, pairs=policy.pairs, scored=policy.scored, pictures=policy.pictures, adapter=False, backward=False
    )
    expected = (limits.flops(policy, setting) + limits.flops(alone, setting) / 3) / 2
    assert math.isclose(limits.products(trainer, side, setting), expected)


def test_the_limit_of_the_committed_setting() -> None:
    """TRL: 2 (P + R) rows through forward, backward and reference; ours: P + 2 R through forward, backward and a third of a reference."""
    setting = Setting(records=2)
    pytest.importorskip("trl", reason="TRL is a peer, installed with the [peers] extra")
    flop = limits.of_sides({"TRL": Side(kind="trl"), "ours": ours()}, setting)
    rows = setting.prompt_tokens, setting.response_tokens + 1
    assert flop["TRL"] / flop["ours"] == pytest.approx(6 * sum(rows) / (7 / 3 * (rows[0] + 2 * rows[1])), rel=0.05)
