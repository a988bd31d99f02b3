"""DeepSeek-VL: pictures of one size, each the same number of image tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmdpo_trainers.models.families.family import Family
from mmdpo_trainers.models.families.images import View
from mmdpo_trainers.models.families.llava import square


class DeepseekVL(Family):
    name = "deepseek_vl"
    model_name = "DeepseekVLForConditionalGeneration"
    processor_name = "DeepseekVLProcessor"
    vision: tuple[str, ...] = ("vision_model",)
    projector: tuple[str, ...] = ("aligner",)

    def views(
        self, processor: Any, inputs: dict[str, Tensor], index: int, size: tuple[int, int], block: list[int]
    ) -> tuple[View, ...]:
        # The picture stands in the middle of a square.
        side = int(processor.num_image_tokens**0.5)
        return (View(side, side, square(*size)),)

    def image_tokens(self, processor: Any, size: tuple[int, int], alone: bool = True) -> int:
        return int(processor.num_image_tokens)


class DeepseekVLHybrid(DeepseekVL):
    """A second tower for the same picture in higher resolution."""

    name = "deepseek_vl_hybrid"
    model_name = "DeepseekVLHybridForConditionalGeneration"
    processor_name = "DeepseekVLHybridProcessor"
    vision = ("vision_model", "high_res_vision_model")
    projector = ("aligner", "high_res_vision_neck", "high_res_vision_proj", "high_res_vision_alpha")
