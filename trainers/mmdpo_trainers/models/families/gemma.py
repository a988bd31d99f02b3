"""Gemma3: pictures of one size whose image tokens see each other both ways, and a mark before and behind each."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from mmdpo_trainers.models.families.family import Family
from mmdpo_trainers.models.families.images import View


class Gemma3(Family):
    """In every layer; a sliding window limits what image tokens see of their own picture, too."""

    name = "gemma3"
    model_name = "Gemma3ForConditionalGeneration"
    processor_name = "Gemma3Processor"
    vision = ("vision_tower",)
    projector = ("multi_modal_projector",)
    token_types = "token_type_ids"

    def image_token(self, processor: Any) -> str:
        # The processor calls the mark before a picture so, which is what a prompt has for one.
        return str(processor.tokenizer.image_token)

    def placeholder(self, processor: Any) -> str:
        return f"\n\n{processor.boi_token}{self.image_token(processor)}{processor.tokenizer.eoi_token}\n\n"

    def processor_text(self, processor: Any) -> str:
        return str(processor.boi_token)

    def views(
        self, processor: Any, inputs: dict[str, Tensor], index: int, size: tuple[int, int], block: list[int]
    ) -> tuple[View, ...]:
        side = int(processor.image_seq_length**0.5)
        return (View(side, side),)

    def image_tokens(self, processor: Any, size: tuple[int, int], alone: bool = True) -> int:
        return int(processor.image_seq_length)

    def blocks(self, is_image: np.ndarray, prompt: int) -> np.ndarray:
        return runs(is_image)


def runs(is_image: np.ndarray) -> np.ndarray:
    """(L,) int64: the number of the run of image tokens that each token is in, -1 = none. transformers takes a run for one picture."""
    starts = is_image & ~np.concatenate([[False], is_image[:-1]])
    return np.where(is_image, starts.cumsum() - 1, -1)


def check_window(blocks: np.ndarray, window: int | None, what: str) -> None:
    """ValueError for a block longer than the window, where a model's mask has tokens see all of theirs, however far back it begins."""
    longest = int(np.bincount(blocks[blocks >= 0]).max(initial=0))
    if window is not None and longest > window:
        raise ValueError(
            f"{what} of {longest} tokens sees itself both ways past the sliding window of {window}, for which a packed tree has no mask"
        )
