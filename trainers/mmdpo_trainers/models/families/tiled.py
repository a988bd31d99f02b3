"""Families that cut a picture into tiles of one size: InternVL, Aya Vision, Qianfan-OCR, Idefics3 and SmolVLM."""

from __future__ import annotations

import re
import sys
from typing import Any

from torch import Tensor

from mmdpo_trainers.models.families.family import Family
from mmdpo_trainers.models.families.images import Box, View


class InternVL(Family):
    """The tiles row by row, then the whole picture where there is more than one."""

    name = "internvl"
    model_name = "InternVLForConditionalGeneration"
    processor_name = "InternVLProcessor"
    vision = ("vision_tower",)
    projector = ("multi_modal_projector",)
    processor_counts = True

    def views(
        self, processor: Any, inputs: dict[str, Tensor], index: int, size: tuple[int, int], block: list[int]
    ) -> tuple[View, ...]:
        images, length = processor.image_processor, self.tile_tokens(processor)
        side, tiles = int(length**0.5), block.count(self.image_token_id(processor)) // length
        if tiles == 1:
            return (View(side, side),)
        canvas = getattr(sys.modules[type(images).__module__], "get_optimal_tiled_canvas", None)
        if canvas is None:
            return ()
        tile = images.size["height"], images.size["width"]
        columns, rows = canvas((size[1], size[0]), tile, images.min_patches, images.max_patches)
        return (*_tiles(rows, columns, side), View(side, side))

    def tile_tokens(self, processor: Any) -> int:
        """Image tokens of a tile."""
        return int(processor.image_seq_length)


class AyaVision(InternVL):
    """InternVL's way, with a mark before each tile."""

    name = "aya_vision"
    model_name = "AyaVisionForConditionalGeneration"
    processor_name = "AyaVisionProcessor"
    processor_counts = False

    def image_token(self, processor: Any) -> str:
        # What the processor calls so is what a prompt has for a picture.
        return str(processor.img_patch_token)

    def placeholder(self, processor: Any) -> str:
        return f"{processor.start_of_img_token}{self.image_token(processor)}{processor.end_of_img_token}"

    def processor_text(self, processor: Any) -> str:
        return str(processor.image_token)

    def tile_tokens(self, processor: Any) -> int:
        return int((processor.img_size // processor.patch_size) ** 2)


class QianfanOcr(InternVL):
    """InternVL's way, but for what stands for a picture in a prompt."""

    name = "qianfan_ocr"
    model_name = "QianfanOCRForConditionalGeneration"
    processor_name = "QianfanOCRProcessor"

    def placeholder(self, processor: Any) -> str:
        return f"{processor.start_image_token}{self.image_token(processor)}{processor.end_image_token}"

    def processor_text(self, processor: Any) -> str:
        return str(processor.image_placeholder_token)


class Idefics3(Family):
    """The tiles row by row, each behind a mark with its row and column, then the whole picture."""

    name = "idefics3"
    model_name = "Idefics3ForConditionalGeneration"
    processor_name = "Idefics3Processor"
    vision = ("vision_model",)
    projector = ("connector",)
    processor_counts = True

    def views(
        self, processor: Any, inputs: dict[str, Tensor], index: int, size: tuple[int, int], block: list[int]
    ) -> tuple[View, ...]:
        side = int(processor.image_seq_len**0.5)
        places = re.findall(r"<row_(\d+)_col_(\d+)>", " ".join(processor.tokenizer.convert_ids_to_tokens(block)))
        rows, columns = (max((int(place[axis]) for place in places), default=0) for axis in (0, 1))
        return (*_tiles(rows, columns, side), View(side, side))


class SmolVLM(Idefics3):
    name = "smolvlm"
    model_name = "SmolVLMForConditionalGeneration"
    processor_name = "SmolVLMProcessor"
    processor_counts = False


def _tiles(rows: int, columns: int, side: int) -> list[View]:
    """Square views of a picture cut into equal tiles."""
    boxes: list[Box] = [
        (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
        for row in range(rows)
        for column in range(columns)
    ]
    return [View(side, side, box) for box in boxes]
