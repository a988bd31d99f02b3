"""Llama 4: a picture's tiles row by row with marks between them, then the whole picture; the head lies inside the language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmdpo_trainers.models.families.family import Family
from mmdpo_trainers.models.families.images import EncodedImages


class Llama4(Family):
    name = "llama4"
    model_name = "Llama4ForConditionalGeneration"
    processor_name = "Llama4Processor"
    vision = ("vision_model",)
    projector = ("multi_modal_projector",)

    def image_token(self, processor: Any) -> str:
        # The processor calls the mark before the whole picture so, which is what a prompt has for one.
        return str(processor.img_patch_token)

    def placeholder(self, processor: Any) -> str:
        return f"{processor.start_of_img_token}{self.image_token(processor)}{processor.end_of_img_token}"

    def processor_text(self, processor: Any) -> str:
        return str(processor.fake_image_token)

    def features(self, body: Any, pictures: EncodedImages) -> list[Tensor]:
        hidden = body.get_image_features(**pictures.inputs, return_dict=True).last_hidden_state
        return list(body.multi_modal_projector(hidden.flatten(0, -2)).split(pictures.tokens))

    def hidden_states(self, body: Any, input_ids: Tensor, features: list[Tensor], feature_rows: Tensor, **inputs: Any) -> Tensor:
        if features:
            inputs["inputs_embeds"] = self.embeds(body, input_ids, torch.cat(features)[feature_rows])
        else:
            inputs["input_ids"] = input_ids
        return body.get_decoder()(**inputs).last_hidden_state  # type: ignore[no-any-return]
