"""Llama 3.2 Vision: pictures are keys of cross-attention layers, and a prompt holds one mark for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmdpo_trainers.models.families.family import Family
from mmdpo_trainers.models.families.images import EncodedImages


class Mllama(Family):
    """A text token sees the pictures marked last before it: those of one run of marks, up to the next run."""

    name = "mllama"
    model_name = "MllamaForConditionalGeneration"
    processor_name = "MllamaProcessor"
    vision = ("vision_model",)
    projector = ("multi_modal_projector",)
    cross_attention = True

    def model_inputs(self, pictures: EncodedImages, rows: Sequence[Sequence[int]], input_ids: Tensor) -> dict[str, Tensor]:
        widest = max(map(len, rows))
        found = {}
        for name, value in pictures.inputs.items():
            each = [value[list(row), 0] for row in rows]  # (pictures, ...)
            found[name] = torch.stack([pad(one, (0, 0) * (one.ndim - 1) + (0, widest - len(one))) for one in each])
        tiles = found["aspect_ratio_mask"].bool()  # (B, pictures, tiles)
        return {**found, "cross_attention_mask": (self._sees(input_ids, widest)[..., None] & tiles[:, None]).long()}

    def _block(self, processor: Any, row: list[int]) -> list[int]:
        # The processor moves the opening token behind pictures at the beginning of a text without one.
        return [self.image_token_id(processor)]

    def image_tokens(self, processor: Any, size: tuple[int, int], alone: bool = True) -> int:
        return 1

    def keys(self, pictures: EncodedImages) -> list[int]:
        return [int(tiles) * self._patches for tiles in pictures.inputs["aspect_ratio_mask"].sum((1, 2))]

    def cross_segments(self, pictures: EncodedImages, rows: Sequence[Sequence[int]]) -> Tensor:
        tiles = pictures.inputs["aspect_ratio_mask"].bool()[:, 0]
        found = torch.full((len(rows), max(map(len, rows)), tiles.shape[1]), -1, dtype=torch.int32)
        for row, its_images in enumerate(rows):
            for place, picture in enumerate(its_images):
                found[row, place, tiles[picture]] = place
        return found.flatten(1).repeat_interleave(self._patches, dim=1)

    @property
    def _patches(self) -> int:
        """Keys of a tile: its patches and its class token."""
        vision = self.known_config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2 + 1)

    def features(self, body: Any, pictures: EncodedImages) -> list[Tensor]:
        """Per picture (tiles, patches, H + 1): what the cross-attention layers make keys and values of, and whether there is such a tile."""
        hidden = body.vision_model(**pictures.inputs, return_dict=True).last_hidden_state  # (P, 1, tiles, patches, F)
        found = body.multi_modal_projector(hidden)[:, 0]
        is_tile = pictures.inputs["aspect_ratio_mask"][:, 0, :, None, None].to(found).expand(*found.shape[:-1], 1)
        return list(torch.cat([found, is_tile], dim=-1))

    def hidden_states(self, body: Any, input_ids: Tensor, features: list[Tensor], feature_rows: Tensor, **inputs: Any) -> Tensor:
        """As in `Family`, but feature_rows: (K) for each mark in reading order its picture."""
        if features:
            inputs |= self._cross_attention(input_ids, torch.stack(features), feature_rows)
        return body.get_decoder()(input_ids=input_ids, **inputs).last_hidden_state  # type: ignore[no-any-return]

    def _cross_attention(self, input_ids: Tensor, features: Tensor, feature_rows: Tensor) -> dict[str, Tensor]:
        """The decoder's arguments for pictures (P, tiles, patches, H + 1), each row's as if it were alone in its batch.

        The model itself lets a token before the first picture see all keys, and so those of other rows' pictures. Here these are zeros that
        it does not see, and a row without pictures gets nothing from the cross-attention layers, which alone would skip it.
        """
        counts = (input_ids == self.known_config.image_token_id).sum(1)
        widest = max(int(counts.max()), 1)
        has = torch.arange(widest, device=input_ids.device) < counts[:, None]  # (B, pictures)
        shown = torch.zeros_like(has, dtype=torch.long).masked_scatter(has, feature_rows)
        own = features[shown] * has[:, :, None, None, None].to(features)  # (B, pictures, tiles, patches, H + 1)
        states, is_tile = own[..., :-1], own[..., 0, -1] > 0
        sees = self._sees(input_ids, widest)[..., None] & is_tile[:, None]  # (B, S, pictures, tiles)
        before = ~sees.flatten(2).any(-1)[..., None, None]
        visible = torch.where(before, has[:, None, :, None], sees).expand(*sees.shape[:2], widest, own.shape[2])
        hidden = torch.zeros_like(visible, dtype=states.dtype).masked_fill(~visible, torch.finfo(states.dtype).min)
        return {
            "cross_attention_states": states.flatten(1, 3),
            "cross_attention_mask": hidden.repeat_interleave(own.shape[3], dim=3).flatten(2)[:, None],
            "full_text_row_masked_out_mask": (~before[:, None, :, :, 0]).to(states.dtype),
        }

    def _sees(self, input_ids: Tensor, widest: int) -> Tensor:
        """(B, S, widest) bool: whether a token sees the row's k-th picture, by its mark."""
        length = input_ids.shape[1]
        marks = input_ids == self.known_config.image_token_id
        found = torch.zeros(*input_ids.shape, widest, dtype=torch.bool, device=input_ids.device)
        for row, its_marks in enumerate(marks):
            places = its_marks.nonzero()[:, 0].tolist()
            end = length
            for place in reversed(range(len(places))):
                if place + 1 < len(places) and places[place + 1] != places[place] + 1:
                    end = places[place + 1]
                found[row, places[place] : end, place] = True
        return found
