"""Recorded attention mass against transformers' own eager attention maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmdpo_kernels import record_attention
from mmdpo_kernels.patched import language_tower
from mmdpo_trainers.answers.attention_ratios import resolve_layer
from mmdpo_trainers.checks.copies import copy_of, patched
from mmdpo_trainers.checks.inputs import answers, prompt_records
from mmdpo_trainers.checks.result import CheckFailure, CheckResult, Differences, rounding
from mmdpo_trainers.checks.segments import segments_of_images
from mmdpo_trainers.models.encode import EncodedPrompts, encode_prompts
from mmdpo_trainers.models.loaded import LoadedModel

_STEPS = 8
"""Rounding steps of a mass, which is at most 1, that counts as exact."""


@torch.no_grad()
def check_mass(loaded: LoadedModel) -> CheckResult:
    """Mass of teacher-forced answers on each picture, at the middle one of the layers that see pictures."""
    records, layer = prompt_records(), resolve_layer(loaded.image_layers)
    batch = encode_prompts(loaded, records, padding_side="right", answers=answers())
    segments = segments_of_images(loaded, batch)
    number = int(segments.max()) + 1
    if batch.cross_segments is None:
        # Row by row: a padding token that sees nothing makes eager attention in float64 NaN.
        alone = [
            encode_prompts(loaded, [one], padding_side="right", answers=[answer])
            for one, answer in zip(records, answers(), strict=True)
        ]
        expected = torch.cat([_eager_mass(loaded, one, layer, number) for one in alone])
    else:
        # Text before the first picture sees the pictures of other rows, too.
        expected = _eager_mass(loaded, batch, layer, number)
    is_cross = batch.cross_segments is not None
    tokens = torch.full_like(batch.inputs["input_ids"], -1) if is_cross else segments
    rows = _answer_rows(batch)
    settings: dict[str, Any] = {"layers": [layer], "num_segments": number, "cross_segments": batch.cross_segments}
    with patched(loaded.model), record_attention(loaded.model, tokens, rows, **settings) as recorder:
        loaded.model(**batch.inputs, use_cache=False)
    found = Differences(loaded.dtype, limit=_STEPS * rounding(loaded.dtype))
    found.add(recorder.mass[layer], expected, f"layer {layer}", scale=1.0)
    if not bool(expected.sum() > 0):
        raise CheckFailure("eager attention gives no picture any attention, so nothing is compared")
    return found.result("mass", f"{int(rows.sum())} answer rows at layer {layer}, {int((expected > 0).sum())} pictures")


def _answer_rows(encoded: EncodedPrompts) -> Tensor:
    """(B, S) bool: rows that predict the answers' tokens, and what follows them."""
    rows = torch.zeros_like(encoded.inputs["input_ids"], dtype=torch.bool)
    for row, (start, stop) in enumerate(encoded.response_spans):
        rows[row, start - 1 : stop] = True
    return rows


def _eager_mass(loaded: LoadedModel, encoded: EncodedPrompts, layer: int, number: int) -> Tensor:
    """(B, N) float64, from eager attention maps."""
    maps, rows, segments = _eager_maps(loaded, encoded, layer), _answer_rows(encoded), segments_of_images(loaded, encoded)
    if maps.shape[-1] != segments.shape[1]:
        raise CheckFailure(f"layer {layer}: eager attention has {maps.shape[-1]} keys, segments cover {segments.shape[1]}")
    mean = (maps.mean(1) * rows[..., None]).sum(1) / rows.sum(1, keepdim=True)  # (B, K)
    one_hot = torch.stack([segments == n for n in range(number)], -1).to(maps)  # (B, K, N)
    return torch.einsum("bk,bkn->bn", mean, one_hot)


def _eager_maps(loaded: LoadedModel, encoded: EncodedPrompts, layer: int) -> Tensor:
    """(B, Hq, S, K) float64: the attention of one layer, by transformers' eager implementation on the same weights."""
    found: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        # Eager attention returns its map beside its output, whether anyone asks or not; decoder layers return one tensor.
        if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor) and output[1].ndim == 4:
            found.append(output[1])

    with copy_of(loaded.model) as other:
        tower = language_tower(other)
        tower.set_attn_implementation("eager")
        for module in tower.modules():
            if getattr(module, "layer_idx", None) == layer:
                module.register_forward_hook(keep)
        other(**encoded.inputs, use_cache=False)
    if len(found) != 1:
        raise CheckFailure(f"layer {layer}: expected one eager attention map, got {len(found)}")
    return found[0].double()
