"""PaliGemma and PaliGemma 2: pictures in front of a question, and all of the prompt sees itself both ways (prefix-LM)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdpo_trainers.data.records import IMAGE_TOKEN
from mmdpo_trainers.models.families.family import Family
from mmdpo_trainers.models.families.gemma import check_window
from mmdpo_trainers.models.families.images import View


class PaliGemma(Family):
    """In every layer, and however far: PaliGemma 2's sliding window does not limit what a prompt sees of itself.

    Two sequences of a tree share their prompt if it is the same to its end, and nothing else: what a picture's tokens become depends on the
    question behind it.
    """

    name = "paligemma"
    model_name = "PaliGemmaForConditionalGeneration"
    processor_name = "PaliGemmaProcessor"
    vision = ("vision_tower",)
    projector = ("multi_modal_projector",)
    token_types = "token_type_ids"
    prefix = True
    first_position = 1
    own_prompts = True

    def plain_prompt(self, processor: Any, prompt: str) -> str:
        """Pictures where the prompt has them, a beginning token behind the last, the text, and a line break, as the processor has it."""
        before, mark, question = prompt.rpartition(IMAGE_TOKEN)
        text = f"{before}{mark}{processor.tokenizer.bos_token}{question.removeprefix(chr(10)) if mark else question}\n"
        return text.replace(IMAGE_TOKEN, self.placeholder(processor))

    def processed(self, processor: Any, text: str, pictures: Sequence[Image.Image]) -> Mapping[str, Any]:
        if not pictures:  # the processor refuses texts without pictures
            found = processor.tokenizer([text], return_tensors="pt", add_special_tokens=False)
            return {**found, "token_type_ids": torch.zeros_like(found["input_ids"])}
        bare = text.replace(processor.tokenizer.bos_token, "", 1).removesuffix("\n")
        return {name: value for name, value in super().processed(processor, bare, pictures).items() if name != "labels"}

    def _block(self, processor: Any, row: list[int]) -> list[int]:
        image = self.image_token_id(processor)
        return [image] * row.count(image)

    def image_tokens(self, processor: Any, size: tuple[int, int], alone: bool = True) -> int:
        return int(processor.image_seq_length)

    def views(
        self, processor: Any, inputs: dict[str, Tensor], index: int, size: tuple[int, int], block: list[int]
    ) -> tuple[View, ...]:
        side = int(processor.image_seq_length**0.5)
        return (View(side, side),)

    def blocks(self, is_image: np.ndarray, prompt: int) -> np.ndarray:
        found = np.where(np.arange(len(is_image)) < prompt, 0, -1)
        check_window(found, getattr(self.known_config.get_text_config(), "sliding_window", None), "a prompt")
        return found
