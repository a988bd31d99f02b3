"""HyperCLOVA X Vision: Qwen2.5-VL's tower, and a language model whose logits are multiplied where Granite's are divided."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmdpo_trainers.models.families.family import Family
from mmdpo_trainers.models.families.images import View


class HyperClovaX(Family):
    name = "hyperclovax_vision_v2"
    model_name = "HyperCLOVAXVisionV2ForConditionalGeneration"
    processor_name = "HyperCLOVAXVisionV2Processor"
    vision = ("vision_model",)
    projector = ("projector",)
    divides_logits = False
    other_in_vllm = "the same tokens with perplexities up to 0.8 of their size apart"

    def placeholder(self, processor: Any) -> str:
        return f"<|vision_start|>{self.image_token(processor)}<|vision_end|>"

    def views(
        self, processor: Any, inputs: dict[str, Tensor], index: int, size: tuple[int, int], block: list[int]
    ) -> tuple[View, ...]:
        _, rows, columns = inputs["image_grid_thw"][index].tolist()
        merge = processor.image_processor.merge_size
        return (View(rows // merge, columns // merge),)
