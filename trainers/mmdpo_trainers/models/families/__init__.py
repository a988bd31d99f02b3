"""The model families that can be used, and what differs between them: placeholders, pictures, image tokens and positions.

One declaration a family, beside what all of them share (`Family`). A family without one works where it follows transformers' conventions
(`Conventional`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mmdpo_kernels
from mmdpo_trainers.models.families.conventional import CHECKED, Conventional
from mmdpo_trainers.models.families.deepseek import DeepseekVL, DeepseekVLHybrid
from mmdpo_trainers.models.families.family import Family, expand_ids, hiding_refusal, image_layers
from mmdpo_trainers.models.families.gemma import Gemma3
from mmdpo_trainers.models.families.gemma3n import Gemma3n
from mmdpo_trainers.models.families.gemma4 import Gemma4, Gemma4Unified
from mmdpo_trainers.models.families.glm import Glm4v, Glm4vMoe, Glm46V
from mmdpo_trainers.models.families.hyperclova import HyperClovaX
from mmdpo_trainers.models.families.images import EncodedImages, View, inside, plain_grid
from mmdpo_trainers.models.families.llava import Llava, LlavaNext, LlavaOnevision
from mmdpo_trainers.models.families.minicpm import MiniCPMV46, MiniCPMV47
from mmdpo_trainers.models.families.mistral import Mistral3
from mmdpo_trainers.models.families.mllama import Mllama
from mmdpo_trainers.models.families.omni import Qwen3Omni, Qwen25Omni
from mmdpo_trainers.models.families.ovis import Ovis2
from mmdpo_trainers.models.families.paddle import PaddleOcrVL
from mmdpo_trainers.models.families.paligemma import PaliGemma
from mmdpo_trainers.models.families.qwen import Qwen2VL, Qwen3VL, Qwen3VLMoe, Qwen25VL, Qwen35, Qwen35Moe
from mmdpo_trainers.models.families.refused import REFUSED, refusal_of
from mmdpo_trainers.models.families.tiled import AyaVision, Idefics3, InternVL, QianfanOcr, SmolVLM

__all__ = [
    "CHECKED",
    "FAMILIES",
    "REFUSED",
    "Conventional",
    "EncodedImages",
    "Family",
    "View",
    "expand_ids",
    "family_of",
    "fixed_grid",
    "hiding_refusal",
    "inside",
    "image_layers",
    "plain_grid",
    "refusal_of",
    "tree_refusal",
]

_DECLARED: tuple[type[Family], ...] = (
    *(Llava, LlavaNext, LlavaOnevision),
    *(Qwen2VL, Qwen25VL, Qwen3VL, Qwen3VLMoe, Qwen35, Qwen35Moe),
    *(Glm4v, Glm4vMoe, Glm46V),
    *(InternVL, Idefics3, SmolVLM),
    *(Gemma3, Gemma3n, Gemma4, Gemma4Unified, PaliGemma),
    *(MiniCPMV46, MiniCPMV47),
    *(Qwen25Omni, Qwen3Omni, PaddleOcrVL),
    *(Mistral3, Mllama, AyaVision, DeepseekVL, DeepseekVLHybrid),
    *(HyperClovaX, Ovis2, QianfanOcr),
)

FAMILIES: dict[str, type[Family]] = {family.name: family for family in _DECLARED}
"""By `model_type` of config.json."""


def fixed_grid(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """`Family.fixed_grid` of the family that a config.json's values name; a nameless one is taken for LLaVA-1.5's."""
    family = FAMILIES.get(config.get("model_type", Llava.name))
    return None if family is None else family.fixed_grid(config)


def tree_refusal(model: Any) -> str | None:
    """Why packed token trees are not exact with a model, or None where they are: by its layers, or by its family."""
    return mmdpo_kernels.tree_refusal(model) or family_of(model).tree_refusal


def family_of(source: Any) -> Family:
    """The family of a model (inside PEFT or not), of its configuration, or of its processor (which has no positions to give).

    Raises ValueError, saying what is missing, where it is of `REFUSED`, or none of `FAMILIES` and does not follow the conventions either.
    """
    config = getattr(source, "config", source)
    kind = getattr(config, "model_type", None)
    if kind in FAMILIES:
        return FAMILIES[kind](config)
    if kind in REFUSED:
        raise ValueError(f"model: family {kind!r} is refused: {REFUSED[kind]}")
    if kind is not None:
        return Conventional(config)
    for family in FAMILIES.values():
        if any(parent.__name__ == family.processor_name for parent in type(source).__mro__):
            return family()
    if hasattr(source, "image_processor") and hasattr(source, "tokenizer"):
        return Conventional()
    raise ValueError(f"model: expected a model, its configuration or its processor, got {type(source).__name__}")
