"""Aya Vision: a picture in tiles with a mark before each, and the whole of it after them."""

from __future__ import annotations

from typing import Any

from mmdpo_trainers.models.families.family import Family


class AyaVision(Family):
    name = "aya_vision"
    model_name = "AyaVisionForConditionalGeneration"
    processor_name = "AyaVisionProcessor"
    vision = ("vision_tower",)
    projector = ("multi_modal_projector",)

    def image_token(self, processor: Any) -> str:
        # What the processor calls so is what a prompt has for a picture.
        return str(processor.img_patch_token)

    def placeholder(self, processor: Any) -> str:
        return f"{processor.start_of_img_token}{self.image_token(processor)}{processor.end_of_img_token}"

    def processor_text(self, processor: Any) -> str:
        return str(processor.image_token)
