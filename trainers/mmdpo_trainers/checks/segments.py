"""Which tokens are of which picture, found by changing one picture at a time and looking what reaches the decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmdpo_kernels import image_segments
from mmdpo_kernels.patched import language_tower
from mmdpo_trainers.checks.baseline import processor_inputs
from mmdpo_trainers.checks.inputs import drawn_image, prompt_records
from mmdpo_trainers.checks.result import CheckFailure, CheckResult, rounding
from mmdpo_trainers.models.encode import EncodedPrompts, encode_prompts
from mmdpo_trainers.models.families import View
from mmdpo_trainers.models.loaded import LoadedModel

_STEPS = 8
"""Rounding steps below which a token's embedding is as it was: kernels may add in another order."""


@torch.no_grad()
def check_segments(loaded: LoadedModel) -> CheckResult:
    """Token ids are the processor's own, tokens are as many as features, and each picture's tokens are those that change with it."""
    records = prompt_records()
    encoded = encode_prompts(loaded, records, padding_side="right")
    for row, record in enumerate(records):
        _check_ids(loaded, record, encoded, row)
    _check_counts(loaded, records, encoded)
    segments = segments_of_images(loaded, encoded)
    before, pictures = _seen_by_decoder(loaded, encoded), 0
    for row, record in enumerate(records):
        for place, picture in enumerate(record["images"]):
            changed = _changed(loaded, records, row, place, before)
            where = f"record {record['id']}, picture {place} of {picture.size}"
            is_cross = encoded.cross_segments is not None
            _check_changed(changed, segments, row, place, encoded.views[row][place], where, is_cross)
            pictures += 1
    return CheckResult(name="segments", figure=0.0, limit=0.0, verdict="exact", detail=f"{pictures} pictures changed one by one")


def segments_of_images(loaded: LoadedModel, encoded: EncodedPrompts) -> Tensor:
    """(B, S), or (B, K) for keys of cross-attention: the index of the picture within its row, -1 = none."""
    if encoded.cross_segments is not None:
        return encoded.cross_segments
    return image_segments(encoded.inputs["input_ids"], loaded.image_token_id, encoded.tokens_per_image)


def _check_ids(loaded: LoadedModel, record: dict[str, Any], encoded: EncodedPrompts, row: int) -> None:
    expected = processor_inputs(loaded, record["prompt"], record["images"])["input_ids"][0].tolist()
    got = encoded.inputs["input_ids"][row, encoded.inputs["attention_mask"][row].bool()].tolist()
    if got != expected:
        same = (one == other for one, other in zip(got, expected, strict=False))
        first = next((place for place, is_same in enumerate(same) if not is_same), min(len(got), len(expected)))
        shown = [loaded.tokenizer.decode(ids[first : first + 6]) for ids in (expected, got)]
        raise CheckFailure(
            f"record {record['id']}: token ids are not the processor's own from token {first} on: expected {len(expected)} tokens and "
            f"there {shown[0]!r}, got {len(got)} and {shown[1]!r}"
        )


def _check_counts(loaded: LoadedModel, records: list[dict[str, Any]], encoded: EncodedPrompts) -> None:
    """As many tokens (keys, where pictures are cross-attended) as the vision tower has features, in a batch and alone."""
    family = loaded.family
    for record, tokens in zip(records, encoded.tokens_per_image, strict=True):
        images = record["images"]
        if not images:
            continue
        pictures = family.encode_images(loaded.processor, images, [len(images) == 1] * len(images))
        inputs = {
            name: value.to(loaded.device, loaded.dtype if value.is_floating_point() else value.dtype)
            for name, value in pictures.inputs.items()
        }
        found = family.features(loaded.model.base_model, dataclasses.replace(pictures, inputs=inputs))
        if not family.cross_attention and [len(each) for each in found] != tokens:
            raise CheckFailure(f"record {record['id']}: {tokens} tokens by picture, {[len(each) for each in found]} features")
        if family.keys(pictures) != tokens:
            raise CheckFailure(f"record {record['id']}: {family.keys(pictures)} tokens by picture alone, {tokens} in a batch")


def _seen_by_decoder(loaded: LoadedModel, encoded: EncodedPrompts) -> Tensor:
    """(B, S, H): what the first decoder layer reads; (B, K, H), what cross-attention layers read."""
    decoder = language_tower(loaded.model)
    found: dict[str, Any] = {}

    def of_decoder(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found["pictures"] = kwargs.get("cross_attention_states")

    def of_layer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found["tokens"] = args[0] if args else kwargs["hidden_states"]

    watched = (decoder, of_decoder), (decoder.layers[0], of_layer)
    hooks = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in watched]
    try:
        loaded.model(**encoded.inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if encoded.cross_segments is None:
        return found["tokens"].clone()  # type: ignore[no-any-return]
    return found["pictures"].reshape(*encoded.cross_segments.shape, -1).clone()  # type: ignore[no-any-return]


def _changed(loaded: LoadedModel, records: list[dict[str, Any]], row: int, place: int, before: Tensor) -> Tensor:
    """(B, S) bool: what the decoder reads otherwise when one picture is another of its size."""
    pictures = [list(record["images"]) for record in records]
    pictures[row][place] = drawn_image(pictures[row][place].size, 100 + place)
    after = _seen_by_decoder(loaded, encode_prompts(loaded, records, padding_side="right", pictures=pictures))
    if after.shape != before.shape:
        raise CheckFailure(
            f"record {records[row]['id']}: with another picture of the same size there are other numbers of tokens"
        )
    # Nothing changes but for that picture's features, so anything above rounding counts.
    return (after - before).abs().amax(-1) > _STEPS * rounding(loaded.dtype) * before.abs().amax(-1)


def _check_changed(
    changed: Tensor, segments: Tensor, row: int, place: int, views: Sequence[View], where: str, is_cross: bool
) -> None:
    expected = torch.zeros_like(changed)
    mine = segments[row] == place
    expected[row] = mine
    shows = _shows(views, int(mine.sum()))
    if shows is not None:
        # Marks at the ends of rows are image tokens that no pixel changes.
        expected[row, mine.nonzero()[:, 0][~shows.to(mine.device)]] = False
    elif is_cross:
        # Padding tiles change with their picture, and are seen by nobody.
        changed = changed & (segments >= 0)
    elif bool(changed[expected].any()):
        # Where it is not known what each image token shows, some may be marks.
        changed = changed | expected
    if not torch.equal(changed, expected):
        wrong = (changed != expected).nonzero()[0].tolist()
        raise CheckFailure(
            f"{where}: expected {int(expected.sum())} tokens that change with it, got {int(changed.sum())}; the first that is wrong is "
            f"in row {wrong[0]}, token {wrong[1]}"
        )


def _shows(views: Sequence[View], tokens: int) -> Tensor | None:
    """(tokens) bool: which image tokens show anything; None where that is not known."""
    if sum(view.tokens for view in views) != tokens:
        return None
    cells = []
    for view in views:
        its_tokens = torch.zeros(view.tokens, dtype=torch.bool)
        view.shown(its_tokens)[:] = True
        cells.append(its_tokens)
    return torch.cat(cells)
