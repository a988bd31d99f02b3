"""Small random checkpoints with real processors, and small pictures: what the tests run the real code path on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .gemma3 import make_tiny_gemma3
from .gemma4 import make_tiny_gemma4
from .glm import make_tiny_glm4v, make_tiny_glm4v_moe, make_tiny_glm46v
from .idefics import make_tiny_idefics3, make_tiny_smolvlm
from .internvl import make_tiny_internvl
from .llava import CHAT_TEMPLATE, make_tiny_llava
from .llava_next import make_tiny_llava_next
from .llava_onevision import make_tiny_llava_onevision
from .minicpm import make_tiny_minicpmv4_6, make_tiny_minicpmv4_7
from .mistral3 import make_tiny_mistral3, make_tiny_pixtral
from .mllama import make_tiny_mllama
from .paligemma import make_tiny_paligemma, make_tiny_paligemma2
from .parts import SPECIAL_TOKENS, WORDS, sample_pictures
from .parts import make_tokenizer as _tokenizer
from .parts import widen as _widen
from .qwen import (
    QWEN_CHAT_TEMPLATE,
    QWEN_SPECIAL_TOKENS,
    make_tiny_qwen,
    make_tiny_qwen2_vl,
    make_tiny_qwen3_vl,
    make_tiny_qwen3_vl_moe,
)
from .qwen3_5 import make_tiny_qwen3_5, make_tiny_qwen3_5_moe
from .recipes import BY_RECIPE

TINY: dict[str, Callable[..., Path]] = {
    "llava": make_tiny_llava,
    "llava_next": make_tiny_llava_next,
    "llava_onevision": make_tiny_llava_onevision,
    "qwen2_vl": make_tiny_qwen2_vl,
    "qwen2_5_vl": make_tiny_qwen,
    "qwen3_vl": make_tiny_qwen3_vl,
    "qwen3_5": make_tiny_qwen3_5,
    "qwen3_5_moe": make_tiny_qwen3_5_moe,
    "qwen3_vl_moe": make_tiny_qwen3_vl_moe,
    "glm4v": make_tiny_glm4v,
    "glm4v_moe": make_tiny_glm4v_moe,
    "glm46v": make_tiny_glm46v,
    "internvl": make_tiny_internvl,
    "idefics3": make_tiny_idefics3,
    "smolvlm": make_tiny_smolvlm,
    "gemma3": make_tiny_gemma3,
    "gemma4": make_tiny_gemma4,
    "paligemma": make_tiny_paligemma,
    "paligemma2": make_tiny_paligemma2,
    "mistral3": make_tiny_mistral3,
    "pixtral": make_tiny_pixtral,
    "mllama": make_tiny_mllama,
    **{name: BY_RECIPE[name] for name in ("aya_vision", "deepseek_vl")},
    "minicpmv4_6": make_tiny_minicpmv4_6,
    "minicpmv4_7": make_tiny_minicpmv4_7,
}
"""Family -> what writes a tiny checkpoint of it to a folder."""

__all__ = [
    "CHAT_TEMPLATE",
    "QWEN_CHAT_TEMPLATE",
    "QWEN_SPECIAL_TOKENS",
    "SPECIAL_TOKENS",
    "TINY",
    "WORDS",
    "_tokenizer",
    "_widen",
    "make_tiny_gemma3",
    "make_tiny_gemma4",
    "make_tiny_glm46v",
    "make_tiny_glm4v",
    "make_tiny_glm4v_moe",
    "make_tiny_idefics3",
    "make_tiny_internvl",
    "make_tiny_llava",
    "make_tiny_llava_next",
    "make_tiny_llava_onevision",
    "make_tiny_minicpmv4_6",
    "make_tiny_minicpmv4_7",
    "make_tiny_mistral3",
    "make_tiny_mllama",
    "make_tiny_paligemma",
    "make_tiny_paligemma2",
    "make_tiny_pixtral",
    "make_tiny_qwen",
    "make_tiny_qwen2_vl",
    "make_tiny_qwen3_5",
    "make_tiny_qwen3_5_moe",
    "make_tiny_qwen3_vl",
    "make_tiny_qwen3_vl_moe",
    "make_tiny_smolvlm",
    "sample_pictures",
]
