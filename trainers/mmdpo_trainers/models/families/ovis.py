"""Ovis2: a picture and its tiles with marks between them, whose embeddings are of the visual table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmdpo_trainers.models.families.family import Family


class Ovis2(Family):
    name = "ovis2"
    model_name = "Ovis2ForConditionalGeneration"
    processor_name = "Ovis2Processor"
    vision = ("vision_tower",)
    projector = ("visual_embeddings_table",)

    def image_token(self, processor: Any) -> str:
        # What the processor calls so is what a prompt has for a picture.
        return "<IMG_ATOM>"

    def placeholder(self, processor: Any) -> str:
        return f"<IMG_START>{self.image_token(processor)}<IMG_END>"

    def processor_text(self, processor: Any) -> str:
        return str(processor.image_token)

    def embeds(self, body: Any, input_ids: Tensor, placed: Tensor) -> Tensor:
        found = super().embeds(body, input_ids, placed)
        marks = torch.as_tensor(list(self.known_config.visual_indicator_token_ids), device=input_ids.device)
        first = self.known_config.vision_config.vocab_size - self.known_config.vision_config.num_visual_indicator_tokens
        # The table's last rows, one a mark.
        of_marks = body.visual_embeddings_table(torch.arange(first, first + len(marks), device=input_ids.device)).to(found)
        is_mark = input_ids[..., None] == marks
        return torch.where(is_mark.any(-1, keepdim=True), of_marks[is_mark.int().argmax(-1)], found)
