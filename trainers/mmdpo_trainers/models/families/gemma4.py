"""Gemma 4: pictures of every shape; whether and in which layers their tokens see each other both ways is the checkpoint's to say."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdpo_trainers.models.families.family import Family
from mmdpo_trainers.models.families.gemma import check_window, runs
from mmdpo_trainers.models.families.images import View


class Gemma4(Family):
    """With `use_bidirectional_attention="vision"` in layers with a sliding window, which limits that too; else every layer is causal."""

    name = "gemma4"
    model_name = "Gemma4ForConditionalGeneration"
    processor_name = "Gemma4Processor"
    vision: tuple[str, ...] = ("vision_tower",)
    projector: tuple[str, ...] = ("embed_vision",)
    token_types = "mm_token_type_ids"
    processor_counts = True

    def placeholder(self, processor: Any) -> str:
        return f"{processor.boi_token}{self.image_token(processor)}{processor.eoi_token}"

    def processor_text(self, processor: Any) -> str:
        return self.image_token(processor)

    def views(
        self, processor: Any, inputs: dict[str, Tensor], index: int, size: tuple[int, int], block: list[int]
    ) -> tuple[View, ...]:
        columns, rows = (int(most) + 1 for most in inputs["image_position_ids"][index].amax(0))
        pooled = self._pooled(processor)
        return (View(rows // pooled, columns // pooled),)

    def _pooled(self, processor: Any) -> int:
        """Patches of a side that become one image token."""
        return int(processor.image_processor.pooling_kernel_size)

    def blocks(self, is_image: np.ndarray, prompt: int) -> np.ndarray:
        return runs(is_image & (self._both_ways == "vision"))

    @property
    def _both_ways(self) -> str | None:
        return self.known_config.get_text_config().use_bidirectional_attention  # type: ignore[no-any-return]

    @property
    def tree_refusal(self) -> str | None:
        return "all tokens see each other both ways" if self._both_ways == "all" else None

    def hidden_states(self, body: Any, input_ids: Tensor, features: list[Tensor], feature_rows: Tensor, **inputs: Any) -> Tensor:
        decoder, mask = body.get_decoder(), inputs.get("attention_mask")
        if features and getattr(decoder, "hidden_size_per_layer_input", None):
            # By ids, in which padding stands for image tokens; the model itself would look for its embeddings in the table.
            text = input_ids.masked_fill(input_ids == self.known_config.image_token_id, decoder.config.pad_token_id)
            inputs["per_layer_inputs"] = decoder.get_per_layer_inputs(text, None)
        if mask is not None and mask.ndim == 4:
            inputs["attention_mask"] = self.masks(mask)
        return super().hidden_states(body, input_ids, features, feature_rows, **inputs)

    def masks(self, mask: Tensor) -> dict[str, Tensor]:
        """A packed tree's mask (1, 1, 2, S) by kind of layer."""
        causal = torch.arange(1, mask.shape[3] + 1, dtype=mask.dtype, device=mask.device).expand_as(mask[:, :, 1])
        return {"sliding_attention": mask, "full_attention": torch.stack([mask[:, :, 0], causal], dim=2)}


class Gemma4Unified(Gemma4):
    """No vision tower: patches go straight to the decoder. There layers with a window do not limit how far a picture's tokens see."""

    name = "gemma4_unified"
    model_name = "Gemma4UnifiedForConditionalGeneration"
    processor_name = "Gemma4UnifiedProcessor"
    vision = ()

    def _pooled(self, processor: Any) -> int:
        return 1

    def blocks(self, is_image: np.ndarray, prompt: int) -> np.ndarray:
        found = super().blocks(is_image, prompt)
        check_window(found, self.known_config.get_text_config().sliding_window, "a picture")
        return found

    def masks(self, mask: Tensor) -> dict[str, Tensor]:
        return {"sliding_attention": mask, "full_attention": mask}
