"""The GLM-V families: as Qwen2-VL, with other marks around a picture."""

from __future__ import annotations

from typing import Any

from mmdpo_trainers.models.families.qwen import Qwen2VL


class Glm4v(Qwen2VL):
    name = "glm4v"
    model_name = "Glm4vForConditionalGeneration"
    processor_name = "Glm4vProcessor"
    body_name = "Glm4vModel"
    projector = ("visual.downsample", "visual.merger")

    def placeholder(self, processor: Any) -> str:
        return f"<|begin_of_image|>{self.image_token(processor)}<|end_of_image|>"


class Glm4vMoe(Glm4v):
    name = "glm4v_moe"
    model_name = "Glm4vMoeForConditionalGeneration"
    body_name = "Glm4vMoeModel"


class Glm46V(Glm4v):
    name = "glm46v"
    model_name = "Glm46VForConditionalGeneration"
    processor_name = "Glm46VProcessor"
    body_name = "Glm46VModel"
