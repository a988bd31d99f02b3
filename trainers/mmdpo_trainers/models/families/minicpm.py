"""MiniCPM-V 4.6 and 4.7: the whole picture, then its slices row by row, before a decoder of Qwen3.5's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmdpo_trainers.models.families.family import Family
from mmdpo_trainers.models.families.images import EncodedImages, View
from mmdpo_trainers.models.families.qwen import Weightless


class MiniCPMV46(Family):
    """Every picture has the number of its place in the prompt in front of it, as text."""

    name = "minicpmv4_6"
    model_name = "MiniCPMV4_6ForConditionalGeneration"
    processor_name = "MiniCPMV4_6Processor"
    vision = ("vision_tower",)
    projector = ("merger",)

    def blocks_of_prompt(self, processor: Any, blocks: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        tokenizer = processor.tokenizer
        first, last = (
            tokenizer.convert_tokens_to_ids(token) for token in (processor.image_id_start_token, processor.image_id_end_token)
        )
        found: list[Sequence[int]] = []
        for place, block in enumerate(blocks):
            if block and block[0] == first:
                number = tokenizer(str(place), add_special_tokens=False).input_ids
                block = [first, *number, *block[list(block).index(last) :]]
            found.append(block)
        return found

    def views(
        self, processor: Any, inputs: dict[str, Tensor], index: int, size: tuple[int, int], block: list[int]
    ) -> tuple[View, ...]:
        images, high = processor.image_processor, (size[1], size[0])
        step = images.patch_size * (2 if images.downsample_mode == "4x" else 4)
        grid = images.get_sliced_grid(high, images.max_slice_nums, images.scale_resolution) if images.slice_mode else None
        mode = {"downsample_mode": images.downsample_mode}
        whole = images.find_best_resize(high, images.scale_resolution, images.patch_size, allow_upscale=grid is None, **mode)
        found = [View(whole[0] // step, whole[1] // step)]
        if grid is not None:
            refined = images.get_refine_size(high, grid, images.scale_resolution, images.patch_size, allow_upscale=True, **mode)
            rows, columns = grid
            for row in range(rows):
                for column in range(columns):
                    box = (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
                    found.append(View(refined[0] // rows // step, refined[1] // columns // step, box))
        return tuple(found)


class MiniCPMV47(MiniCPMV46):
    """Positions lie on a canvas: a slice's tokens where the slice lies in the picture."""

    name = "minicpmv4_7"
    model_name = "MiniCPMV4_7ForConditionalGeneration"
    processor_name = "MiniCPMV4_7Processor"
    body_name = "MiniCPMV4_7Model"
    token_types = "mm_token_type_ids"

    def encode_images(
        self, processor: Any, pictures: Sequence[Image.Image], alone: Sequence[bool] | None = None
    ) -> EncodedImages:
        found = super().encode_images(processor, pictures, alone)
        slices = processor.tokenizer.convert_tokens_to_ids(processor.slice_start_token)
        each = found.inputs["target_sizes"].long().split([1 + list(block).count(slices) for block in found.blocks])
        return dataclasses.replace(found, grids=pad_sequence(list(each), batch_first=True))

    def hidden_states(self, body: Any, input_ids: Tensor, features: list[Tensor], feature_rows: Tensor, **inputs: Any) -> Tensor:
        # Positions are given, so the decoder itself needs nothing else.
        if features:
            inputs["inputs_embeds"] = self.embeds(body, input_ids, torch.cat(features)[feature_rows])
        else:
            inputs["input_ids"] = input_ids
        return body.get_decoder()(**inputs).last_hidden_state  # type: ignore[no-any-return]

    def position_ids(self, input_ids: Tensor, grids: Tensor | None, attention_mask: Tensor | None = None) -> Tensor:
        """grids: (P, K, 2) patches of each picture and of its slices, zeros behind the last."""
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        if grids is None or not len(grids):
            return (kept.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
        kinds = (input_ids == self.known_config.image_token_id).int()
        sizes = grids.flatten(0, 1)
        model: Any = Weightless(getattr(transformers, self.body_name), self.known_config)
        return model.get_rope_index(  # type: ignore[no-any-return]
            input_ids, mm_token_type_ids=kinds, target_sizes=sizes[sizes.any(1)], attention_mask=kept
        )[0]
