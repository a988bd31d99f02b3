"""What a training step has to compute, counted from the model's own layers: what is run again by checkpointing does not count.

A product of an (n, a) matrix with an (a, b) one is 2 n a b operations. Under frozen weights a backward pass is one product more (the gradient
of the input), under weights that are trained two. Of attention only pairs of a query and a key that it sees count, and its backward twice
its forward, as is usual (Megatron-LM, arXiv 2104.04473), whatever a kernel computes again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.runs.whole_shapes.shapes import Size

STATE_PRODUCTS = 3
"""Of a token with the state of a Gated DeltaNet head: what it recalls, what is written, what is read."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What one forward of a pair runs."""

    tokens: int
    """Through the language tower, padding not counted."""
    pairs: int
    """Of a query and a key that it sees."""
    rows: int
    """Through the output head."""
    pictures: int
    """Through the vision tower, of the policy's forward."""
    reference_pictures: int
    """Of the reference's own forward; 0 where it takes the policy's features."""


def form_of(batch: Any, *, pictures: int, reference_pictures: int) -> Form:
    """Of a batch of one record, as tree or as padded rows."""
    tokens, pairs = _seen(batch.attention_mask)
    return Form(tokens=tokens, pairs=pairs, rows=len(batch.targets), pictures=pictures, reference_pictures=reference_pictures)


def _seen(mask: Tensor) -> tuple[int, int]:
    """Tokens, and pairs of a query and a key, of a tree's mask (1, 1, 1, S) or of a padded one (n, L)."""
    if mask.ndim == 2:
        lengths = mask.sum(1)
        return int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum())
    ends = mask[0, 0, 0]
    return len(ends), int((ends - torch.arange(len(ends))).clamp(min=0).sum())


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Numbers of a model that a token, a response row or a picture meets."""

    language: int
    """Weights of the language tower's linears."""
    adapter: int
    """Weights of its LoRA."""
    head: int
    attention: int
    """Of all layers with attention, products of a pair: heads x head dim."""
    state: int
    """Of all layers that carry a state, entries of their states."""
    picture: int
    """Operations of a picture's forward, projector included."""

    @classmethod
    def of(cls, model: Any, family: Any, size: Size, rank: int) -> Weights:
        text = model.config.get_text_config()
        linears = [module for module in model.get_decoder().modules() if isinstance(module, nn.Linear)]
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
        carrying = kinds.count("linear_attention")
        state = 0
        if carrying:
            state = carrying * text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim
        return cls(
            language=sum(linear.weight.numel() for linear in linears),
            adapter=sum(rank * (linear.in_features + linear.out_features) for linear in linears),
            head=model.get_output_embeddings().weight.numel(),
            attention=(len(kinds) - carrying) * size.heads * size.head_dim,
            state=state,
            picture=_picture(model, family, size),
        )


def _picture(model: Any, family: Any, size: Size) -> int:
    """Operations of one picture's forward through tower and projector."""
    inside = tuple(f"{name}." for name in family.projector)
    vision = model.config.vision_config
    merged = size.patches // getattr(vision, "spatial_merge_size", 1) ** 2
    found = 0
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) and name.startswith(
            (*(f"{part}." for part in family.vision), *inside)
        ):
            found += 2 * module.weight.numel() * (merged if name.startswith(inside) else size.patches)
    windows = getattr(vision, "window_size", None)
    whole = len(vision.fullatt_block_indexes) if windows else size.vision_layers
    pairs = whole * size.patches**2
    if windows:
        pairs += (size.vision_layers - whole) * size.patches * min(size.patches, (windows // size.patch) ** 2)
    return found + 4 * pairs * size.vision_width


def step_flops(weights: Weights, form: Form, *, reference: float) -> float:
    """Operations of a pair's step. reference: forwards of the reference that it is charged with, 1 where it runs beside the policy."""
    linears, head = 2 * form.tokens * weights.language, 2 * form.rows * weights.head
    mixing = 4 * form.pairs * weights.attention + 2 * STATE_PRODUCTS * form.tokens * weights.state
    frozen, adapter = linears + head, 2 * form.tokens * weights.adapter
    policy = 2 * frozen + 3 * (mixing + adapter) + form.pictures * weights.picture
    return policy + reference * (frozen + mixing + form.reference_pictures * weights.picture)
