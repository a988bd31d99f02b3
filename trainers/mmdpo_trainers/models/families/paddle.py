"""PaddleOCR-VL: as Qwen2-VL, with other marks around a picture and the projector beside the tower."""

from __future__ import annotations

from typing import Any

from mmdpo_trainers.models.families.qwen import Qwen2VL


class PaddleOcrVL(Qwen2VL):
    name = "paddleocr_vl"
    model_name = "PaddleOCRVLForConditionalGeneration"
    processor_name = "PaddleOCRVLProcessor"
    body_name = "PaddleOCRVLModel"
    projector = ("projector",)

    def placeholder(self, processor: Any) -> str:
        return f"<|IMAGE_START|>{self.image_token(processor)}<|IMAGE_END|>"
