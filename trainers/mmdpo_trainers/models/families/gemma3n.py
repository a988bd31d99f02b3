"""Gemma 3n: pictures of one size through timm's MobileNet, text and marks embedded each by their own table, every layer causal."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdpo_trainers.models.families.gemma import Gemma3


class Gemma3n(Gemma3):
    """It asks for token types, and its masks make nothing of them."""

    name = "gemma3n"
    model_name = "Gemma3nForConditionalGeneration"
    processor_name = "Gemma3nProcessor"
    projector = ("embed_vision",)

    def image_token(self, processor: Any) -> str:
        return str(processor.image_token)

    def processor_text(self, processor: Any) -> str:
        return str(processor.image_token)

    def blocks(self, is_image: np.ndarray, prompt: int) -> np.ndarray:
        return np.full(len(is_image), -1)

    def hidden_states(self, body: Any, input_ids: Tensor, features: list[Tensor], feature_rows: Tensor, **inputs: Any) -> Tensor:
        # By ids, of which the model makes embeddings of marks, and for each layer; features in the place of its tower's output.
        if features:
            placed = torch.cat(features)[feature_rows]
            inputs["mm_encoder_outputs"] = {"image": SimpleNamespace(pooler_output=placed[None])}
        return body(input_ids=input_ids, **inputs).last_hidden_state  # type: ignore[no-any-return]
