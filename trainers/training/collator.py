"""Preference records (TRL's columns) to model inputs: one token tree a micro-batch, or padded separate sequences."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmdpo_kernels import TokenTree, image_segments
from mmdpo_trainers.attention_ratios import REGION_FORMATS, region_on
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.prompts import render_prompt
from mmdpo_trainers.training.preference_records import (
    prompt_text,
    record_images,
    record_name,
    record_picture,
    record_target,
    response_text,
)


@dataclass(frozen=True)
class RatioSpan:
    """Where the attention ratio of one record is read off recorded masses (B, N)."""

    format: str
    row: int
    """Batch row."""
    first: int
    """Its first segment."""
    count: int
    """Its number of segments: pictures, or the asked-about region and the rest."""
    target: int
    """The asked-about one among them."""

    def ratio(self, mass: Tensor) -> float | None:
        """Share in [0, 1] of the attention on the record's pictures that goes to the asked-about one; None: they get none."""
        mine = mass[self.row, self.first : self.first + self.count]
        total = float(mine.sum())
        return None if total == 0 else float(mine[self.target]) / total


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch:
    """Model inputs of a micro-batch of n records; its sequences are chosen_0, rejected_0, chosen_1, … (2n)."""

    ids: list[str]
    input_ids: Tensor
    """(1, S) of the tree, or (2n, L) padded on the right; int64."""
    attention_mask: Tensor
    """(1, 1, 1, S) int32, the tree; or (2n, L) int64."""
    position_ids: Tensor | None
    """(1, S) int64; None for separate sequences."""
    pixel_values: Tensor | None
    """(P, 3, H, W), each distinct picture once."""
    picture_order: Tensor
    """(K,) int64: the picture of each picture span, in the order of `input_ids`."""
    rows: Tensor
    """(R,) int64: rows of the flattened hidden states that predict response tokens, sequence by sequence."""
    targets: Tensor
    """(R,) int64: the response tokens."""
    lengths: list[int]
    """(2n) response tokens of each sequence, the end token included."""
    segments: Tensor
    """As `input_ids`, int32: attention segment of each token, -1 = none."""
    recorded_rows: Tensor
    """As `input_ids`, bool: the query rows that the attention ratio is over."""
    ratios: list[RatioSpan]
    """Records that have an attention ratio."""

    @property
    def chosen_tokens(self) -> int:
        """Tokens of all chosen responses."""
        return sum(self.lengths[::2])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PreferenceBatch:
        """The batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True)
class _Example:
    record: Mapping[str, Any]
    prompt: list[int]
    responses: tuple[list[int], list[int]]
    pictures: list[int]
    """Index of each of its pictures among the batch's distinct ones."""
    tokens_per_picture: int
    image_token_id: int

    @property
    def name(self) -> str:
        return record_name(self.record)

    def identities(self) -> list[tuple[int, int] | None]:
        """Per prompt token None, or (picture, offset in it)."""
        spans = ((picture, offset) for picture in self.pictures for offset in range(self.tokens_per_picture))
        return [next(spans) if token == self.image_token_id else None for token in self.prompt]

    def segments(self) -> tuple[Tensor, int, int] | None:
        """Segment of each prompt token, number of segments, and which one is asked about; None: nothing to tell apart."""
        boxed = self.record.get("box") is not None and self.record.get("format") in REGION_FORMATS
        in_picture = boxed or self.record.get("region") is not None
        target = None if in_picture else record_target(self.record)
        if not in_picture and target is None:
            return None
        counts = [self.tokens_per_picture] * len(self.pictures)
        try:
            region, grid = self._region() if in_picture else (None, None)
            ids = torch.tensor([self.prompt])
            found = image_segments(ids, self.image_token_id, [counts], regions=[region], patch_grids=[grid])[0]
        except (TypeError, ValueError) as error:
            raise DataError(f"record {self.name}: {error}") from error
        return (found, 2, 0) if in_picture else (found, len(counts), target or 0)

    def _region(self) -> tuple[list[int], tuple[int, int]]:
        """The asked-about rectangle on the model's patches, and how many rows and columns of them a picture has."""
        side = math.isqrt(self.tokens_per_picture)
        region = region_on(self.record, (side, side))
        if region is None:
            raise ValueError(
                f"region is on {self.record.get('patch_grid')} patches, and the model has {side}x{side}; add `box`, or drop region"
            )
        return region, (side, side)


class PreferenceCollator:
    """Turns preference records into `{"batch": PreferenceBatch}`.

    A record has TRL's columns: `prompt` (one user turn, text or a list of parts, `<image>` standing for a picture), `chosen` and
    `rejected` (one assistant turn), `images` (paths or Pillow pictures). Optional: `id`, `format`, and for the attention ratio
    `target`, or `region` with `patch_grid` (where the model's patches are others: `box`). Prompt and response are tokenised each
    on its own and put together, which is what the model sees when it generates; a response ends with `end_id`.

    Raises DataError naming the record: an unreadable picture, placeholders that do not match the pictures, a conversation of
    another shape, a target or region that does not fit, an empty chosen response, a response that holds the image token.
    """

    def __init__(self, processor: Any, *, image_token_id: int, end_id: int, pad_id: int = 0, tree_packing: bool = True) -> None:
        self.processor = processor
        self.image_token_id, self.end_id, self.pad_id = image_token_id, end_id, pad_id
        self.tree_packing = tree_packing

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, PreferenceBatch]:
        examples, pixel_values = self._examples(records)
        build = self._tree if self.tree_packing else self._separate
        return {"batch": build(examples, pixel_values)}

    def length(self, record: Mapping[str, Any]) -> int:
        """Tokens of the prompt and the longer response."""
        example = self._examples([record])[0][0]
        return len(example.prompt) + max(map(len, example.responses))

    def _examples(self, records: Sequence[Mapping[str, Any]]) -> tuple[list[_Example], Tensor | None]:
        prompts = [prompt_text(record) for record in records]
        pictures = [[record_picture(record, image) for image in record_images(record)] for record in records]
        prompt_ids, pixels = self._tokenize(prompts, [picture for row in pictures for picture in row])
        distinct, index_of = _distinct(pixels)
        examples, used = [], 0
        for record, ids, row in zip(records, prompt_ids, pictures, strict=True):
            its_pictures = index_of[used : used + len(row)]
            used += len(row)
            count = ids.count(self.image_token_id)
            if count % max(len(row), 1) or bool(count) != bool(row):
                raise DataError(
                    f"record {record_name(record)}: the processor gave {count} picture tokens for {len(row)} pictures; "
                    "it must give each picture the same number"
                )
            responses = self._response(record, "chosen"), self._response(record, "rejected")
            per_picture = count // len(row) if row else 0
            examples.append(_Example(record, ids, responses, its_pictures, per_picture, self.image_token_id))
        return examples, distinct

    def _tokenize(self, prompts: list[str], pictures: list[Image.Image]) -> tuple[list[list[int]], Tensor | None]:
        texts = [render_prompt(self.processor, prompt) for prompt in prompts]
        bos = self.processor.tokenizer.bos_token
        encoded = self.processor(
            text=texts,
            images=pictures or None,
            padding=True,
            padding_side="right",
            return_tensors="pt",
            # A chat template that writes the opening token itself must not have it doubled.
            add_special_tokens=not (bos and all(text.startswith(bos) for text in texts)),
        )
        pixels = encoded.get("pixel_values")
        if pixels is not None and (pixels.ndim != 4 or len(pixels) != len(pictures)):
            raise DataError(
                f"{type(self.processor).__name__} gives pixels of shape {tuple(pixels.shape)} for {len(pictures)} pictures; "
                "expected one (3, H, W) block a picture, as LLaVA-1.5's processor gives"
            )
        lengths = encoded["attention_mask"].sum(dim=1).tolist()
        return [row[:length] for row, length in zip(encoded["input_ids"].tolist(), lengths, strict=True)], pixels

    def _response(self, record: Mapping[str, Any], column: str) -> list[int]:
        ids = self.processor.tokenizer(response_text(record, column), add_special_tokens=False).input_ids
        if self.image_token_id in ids:
            raise DataError(f"record {record_name(record)}: {column} holds the image token; only prompts have pictures")
        return [*ids, self.end_id]

    def _tree(self, examples: list[_Example], pixel_values: Tensor | None) -> PreferenceBatch:
        sequences = [example.prompt + response for example in examples for response in example.responses]
        identities = [[*example.identities(), *[None] * len(response)] for example in examples for response in example.responses]
        prompt_lengths = [len(example.prompt) for example in examples for _ in example.responses]
        tree = TokenTree.from_sequences(sequences, identities=identities, prompt_lengths=prompt_lengths)
        segments = torch.full((1, tree.num_tokens), -1, dtype=torch.int32)
        recorded = torch.zeros(1, tree.num_tokens, dtype=torch.bool)
        ratios: list[RatioSpan] = []
        for index, example in enumerate(examples):
            place = 0, tree.paths[2 * index][: len(example.prompt)]
            _add_ratio(example, place, tree.rows[2 * index], segments, recorded, ratios)
        spans = [identities[sequence][offset] for sequence, offset in tree.origin.tolist()]
        return PreferenceBatch(
            ids=[example.name for example in examples],
            input_ids=tree.input_ids[None],
            attention_mask=tree.attention_mask,
            position_ids=tree.position_ids[None],
            pixel_values=pixel_values,
            picture_order=torch.tensor([span[0] for span in spans if span is not None and span[1] == 0], dtype=torch.long),
            rows=torch.cat(tree.rows),
            targets=torch.cat(tree.targets),
            lengths=[len(targets) for targets in tree.targets],
            segments=segments,
            recorded_rows=recorded,
            ratios=ratios,
        )

    def _separate(self, examples: list[_Example], pixel_values: Tensor | None) -> PreferenceBatch:
        sequences = [torch.tensor(example.prompt + response) for example in examples for response in example.responses]
        responses = [torch.tensor(response) for example in examples for response in example.responses]
        input_ids = pad_sequence(sequences, batch_first=True, padding_value=self.pad_id)
        segments = torch.full(input_ids.shape, -1, dtype=torch.int32)
        recorded = torch.zeros(input_ids.shape, dtype=torch.bool)
        ratios: list[RatioSpan] = []
        for index, example in enumerate(examples):
            prompt, response = len(example.prompt), example.responses[0]
            chosen_rows = torch.arange(prompt - 1, prompt - 1 + len(response))
            _add_ratio(example, (2 * index, torch.arange(prompt)), chosen_rows, segments, recorded, ratios)
        width = input_ids.shape[1]
        rows = [
            torch.arange(len(sequence) - len(response) - 1, len(sequence) - 1) + width * index
            for index, (sequence, response) in enumerate(zip(sequences, responses, strict=True))
        ]
        return PreferenceBatch(
            ids=[example.name for example in examples],
            input_ids=input_ids,
            attention_mask=pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True),
            position_ids=None,
            pixel_values=pixel_values,
            picture_order=torch.tensor([p for e in examples for _ in e.responses for p in e.pictures], dtype=torch.long),
            rows=torch.cat(rows),
            targets=torch.cat(responses),
            lengths=[len(response) for response in responses],
            segments=segments,
            recorded_rows=recorded,
            ratios=ratios,
        )


def _add_ratio(
    example: _Example,
    place: tuple[int, Tensor],
    rows: Tensor,
    segments: Tensor,
    recorded: Tensor,
    ratios: list[RatioSpan],
) -> None:
    """Give a record's pictures segments of their own, at columns `place[1]` of batch row `place[0]`, and mark its chosen rows."""
    found = example.segments()
    if found is None:
        return
    its_segments, count, target = found
    row, columns = place
    is_picture = its_segments >= 0
    if bool((segments[row, columns[is_picture]] >= 0).any()):
        # The tree shares these pictures with an earlier record, whose rows they are recorded for.
        return
    first = int(segments[row].max()) + 1
    segments[row, columns[is_picture]] = its_segments[is_picture].to(segments) + first
    recorded[row, rows] = True
    ratios.append(RatioSpan(str(example.record.get("format") or "sequence"), row, first, count, target))


def _distinct(pixels: Tensor | None) -> tuple[Tensor | None, list[int]]:
    """Each distinct picture once, and for every picture its index among them."""
    if pixels is None:
        return None, []
    first_of: dict[bytes, int] = {}
    kept: list[int] = []
    index_of: list[int] = []
    for index, picture in enumerate(pixels):
        key = hashlib.sha256(picture.contiguous().numpy().tobytes()).digest()
        if key not in first_of:
            first_of[key] = len(kept)
            kept.append(index)
        index_of.append(first_of[key])
    return pixels[kept], index_of
