"""The thinkers of the Qwen-Omni families: Qwen's vision towers and text models, beside an audio tower that gets nothing here."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from mmdpo_trainers.models.families.qwen import Qwen2VL, Qwen3VL, Weightless


class Qwen25Omni(Qwen2VL):
    name = "qwen2_5_omni_thinker"
    model_name = "Qwen2_5OmniThinkerForConditionalGeneration"
    processor_name = "Qwen2_5OmniProcessor"
    body_name = "Qwen2_5OmniThinkerForConditionalGeneration"
    vision = ("visual", "audio_tower")
    token_types = None

    def placeholder(self, processor: Any) -> str:
        return f"{processor.vision_bos_token}{self.image_token(processor)}{processor.vision_eos_token}"

    def position_ids(self, input_ids: Tensor, grids: Tensor | None, attention_mask: Tensor | None = None) -> Tensor:
        if grids is None or not len(grids):
            return super().position_ids(input_ids, grids, attention_mask)
        model: Any = Weightless(getattr(transformers, self.body_name), self.known_config)
        model.spatial_merge_size = self.known_config.vision_config.spatial_merge_size
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        return model.get_rope_index(input_ids, image_grid_thw=grids, attention_mask=kept)[0].long()


class Qwen3Omni(Qwen25Omni, Qwen3VL):
    name = "qwen3_omni_moe_thinker"
    model_name = "Qwen3OmniMoeThinkerForConditionalGeneration"
    processor_name = "Qwen3OmniMoeProcessor"
    body_name = "Qwen3OmniMoeThinkerForConditionalGeneration"
    projector = ("visual.merger", "visual.merger_list")
