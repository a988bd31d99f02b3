"""The products that a side must do for a pair, from sizes alone: what can be faster by arithmetic, whatever the kernels.

A multiplication and an addition are 2 FLOP. Counted are the matrix products of decoder, adapters, attention, vision tower, projector and head,
forward and backward, with what gradient checkpointing repeats and each side's reference. Under LoRA a linear's backward is the gradient of its
input, and of its adapter both. Attention is counted by the pairs of query and key that see each other, 4 FLOP a channel forward and 8 backward.
Not counted is what no product is: norms, activations, softmax, rotations, optimizer, data. Bytes set no limit here: each weight that is read
(4 bytes) serves two FLOP a row, hundreds of FLOP a byte where a CPU core needs some ten.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from benchmarks.runs.training_step.setting import PATCH, Setting
from benchmarks.runs.training_step.sides import EPOCHS, Side, cached_records, make


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One run of the model."""

    rows: int
    """Of the decoder: tokens, padding included."""
    pairs: int
    """Of query and key that see each other, in one layer and head."""
    scored: int
    """Rows that the head is over."""
    pictures: int
    """That go through vision tower and projector."""
    adapter: bool = True
    backward: bool = True
    recomputed: bool = False
    """Whether decoder layers run again in the backward pass."""
    vision_backward: bool = False
    """Whether the gradient goes on into projector and tower, though nothing is trained there, with the tower's layers run again."""


def products(trainer: Trainer, side: Side, setting: Setting) -> float:
    """FLOP a pair of one step of the side's trainer, its share of a cached reference included."""
    done = sum(flops(each, setting) for each in passes(trainer, side))
    if side.caches:
        count = cached_records(side, setting)
        reference = _tree(trainer, count, side)
        share = side.batch / (EPOCHS * count)
        done += share * flops(dataclasses.replace(reference, adapter=False, backward=False), setting)
    return done / side.batch


def of_sides(sides: Mapping[str, Side], setting: Setting) -> dict[str, float]:
    """`products` of each."""
    return {name: products(make(side, setting), side, setting) for name, side in sides.items()}


def passes(trainer: Trainer, side: Side) -> list[Pass]:
    """What a step runs, but for a cached reference."""
    if side.kind == "ours":
        policy = dataclasses.replace(_tree(trainer, side.batch, side), recomputed=side.checkpointing)
        if side.caches:
            return [policy]
        # What the tower gave the policy is the reference's too.
        pictures = policy.pictures if side.options.get("own_vision") else 0
        return [policy, dataclasses.replace(policy, pictures=pictures, adapter=False, backward=False, recomputed=False)]
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(side.batch)])  # type: ignore[index]
    parts = [batch] if side.kind == "trl" else [batch["pair"], batch["corrupted"]]
    found = [_sequences(part, side) for part in parts]
    return found + [
        dataclasses.replace(each, adapter=False, backward=False, recomputed=False, vision_backward=False) for each in found
    ]


def flops(each: Pass, setting: Setting) -> float:
    """FLOP of a pass."""
    return sum(by_kind(each, setting).values())


def by_kind(each: Pass, setting: Setting) -> dict[str, int]:
    """FLOP of a pass: in linears of decoder and vision, in their attention, in the head."""
    linears, pairs = (sum(both) for both in zip(_decoder(each, setting), _vision(each, setting), strict=True))
    head = (2 + 2 * each.backward) * each.scored * setting.width * setting.vocabulary
    return {"linears": linears, "attention": pairs, "head": head}


def _decoder(each: Pass, setting: Setting) -> tuple[int, int]:
    """FLOP in linears, adapters included, and in attention."""
    width, mlp, rank = setting.width, setting.mlp, setting.lora_r
    weights = 4 * width * width + 3 * width * mlp
    adapters = rank * (4 * 2 * width + 3 * (width + mlp))
    linears, pairs = 2 * each.rows * (weights + adapters * each.adapter), attention(each.pairs, width)
    runs = 1 + each.recomputed
    if not each.backward:
        return setting.layers * linears, setting.layers * pairs
    backward = 2 * each.rows * (weights + 2 * adapters)
    # Run again up to the last tensor that backward needs, the input of the last linear's second adapter matrix; not run again, the first
    # layer's input needs no gradient.
    unneeded = setting.layers * rank * width if each.recomputed else 3 * (width * width + rank * width)
    both = runs * pairs + attention(each.pairs, width, backward=True)
    return setting.layers * (runs * linears + backward) - 2 * each.rows * unneeded, setting.layers * both


def _vision(each: Pass, setting: Setting) -> tuple[int, int]:
    """As `_decoder`, of tower and projector."""
    width, mlp, patches = setting.vision_width, setting.vision_mlp, (setting.side // PATCH) ** 2
    tokens = patches + 1
    a_layer, pairs = 2 * tokens * (4 * width * width + 2 * width * mlp), attention(tokens * tokens, width)
    projected = 2 * patches * (width * setting.width + setting.width * setting.width)
    linears = 2 * patches * 3 * PATCH * PATCH * width + setting.vision_layers * a_layer + projected
    looked = setting.vision_layers * pairs
    if each.vision_backward:
        # Of the layers before the features that are taken, the last but one's; run again up to their last linear.
        again = a_layer - 2 * tokens * width * mlp
        linears += (setting.vision_layers - 1) * (a_layer + again) + projected
        looked += (setting.vision_layers - 1) * (pairs + attention(tokens * tokens, width, backward=True))
    return each.pictures * linears, each.pictures * looked


def attention(pairs: int, width: int, *, backward: bool = False) -> int:
    """FLOP of a layer's attention, all heads: scores and output; backward the gradients of queries, keys, values and probabilities."""
    return (8 if backward else 4) * pairs * width


def _tree(trainer: Any, count: int, side: Side) -> Pass:
    """The policy's pass over the first records, without checkpointing."""
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(count)])["batch"]
    packed = batch.attention_mask.dim() == 4
    pictures = 0 if batch.pictures is None else len(batch.pictures.tokens)
    if side.options.get("own_vision") and not packed:
        pictures *= len(batch.branches)
    if packed:
        ends = batch.attention_mask[0, 0, 0].long()
        pairs = (ends - torch.arange(len(ends))).clamp(min=0).sum()
    else:
        pairs = _causal(batch.attention_mask)
    return Pass(rows=batch.input_ids.numel(), pairs=int(pairs), scored=len(batch.shared_rows.rows), pictures=pictures)


def _sequences(batch: Mapping[str, Tensor], side: Side) -> Pass:
    """The policy's pass over padded sequences with pictures for each."""
    used = batch["completion_mask"] if side.kind == "trl" else batch["labels"] != -100
    return Pass(
        rows=batch["input_ids"].numel(),
        pairs=int(_causal(batch["attention_mask"])),
        scored=batch["input_ids"].numel() if side.kind == "official" else int(used.sum()),
        pictures=len(batch["pixel_values"]),
        recomputed=side.checkpointing,
        vision_backward=side.checkpointing,
    )


def _causal(mask: Tensor) -> Tensor:
    tokens = mask.long().sum(1)
    return (tokens * (tokens + 1) // 2).sum()
