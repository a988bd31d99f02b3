"""GLM-4.1V, GLM-4.5V (experts) and GLM-4.6V: a picture of any size, image tokens by its grid, three-axis positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
)
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

from .parts import make_tokenizer, random_model, save_model, save_processor, token_ids

GLM_SPECIAL_TOKENS = (
    *("<unk>", "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>"),
)

CHAT_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|begin_of_image|><|image|><|end_of_image|>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

_CLASSES: dict[str, tuple[Any, Any, str, Any]] = {
    "glm4v": (Glm4vConfig, Glm4vForConditionalGeneration, "Glm4vProcessor", Glm4vImageProcessorPil),
    "glm4v_moe": (Glm4vMoeConfig, Glm4vMoeForConditionalGeneration, "Glm4vProcessor", Glm4vImageProcessorPil),
    "glm46v": (Glm46VConfig, Glm46VForConditionalGeneration, "Glm46VProcessor", Glm46VImageProcessorPil),
}


def make_tiny_glm4v(folder: str | Path, **options: Any) -> Path:
    """Write a random GLM-4.1V to `folder` and return it."""
    return _make("glm4v", folder, **options)


def make_tiny_glm4v_moe(folder: str | Path, **options: Any) -> Path:
    """Write a random GLM-4.5V to `folder` and return it: a layer without experts, the others with four and one that all tokens share."""
    return _make("glm4v_moe", folder, **options)


def make_tiny_glm46v(folder: str | Path, **options: Any) -> Path:
    """Write a random GLM-4.6V to `folder` and return it."""
    return _make("glm46v", folder, **options)


def _make(
    family: str,
    folder: str | Path,
    *,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    patch: int = 6,
    min_pixels: int = 24 * 24,
    max_pixels: int = 96 * 96,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    hidden: int = 32,
    tied: bool = False,
) -> Path:
    """Two patches by two make an image token, so a picture of H x W pixels gives about (H / 2 patch) (W / 2 patch) of them."""
    folder = Path(folder)
    config_class, model_class, processor_class, images_class = _CLASSES[family]
    tokenizer = make_tokenizer(GLM_SPECIAL_TOKENS, bos=None, eos="<|endoftext|>", pad="<|endoftext|>")
    ids = token_ids(tokenizer, *GLM_SPECIAL_TOKENS)
    # Half of a head turns, and time, height and width share it.
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "mrope_section": [hidden // heads // 8] * 3,
        },
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": tied,
    }
    if family == "glm4v_moe":
        text |= {
            "head_dim": hidden // heads,
            "use_qk_norm": False,
            "moe_intermediate_size": hidden,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        }
    else:
        text["model_type"] = "glm4v_text"
    vision = {
        "depth": 2,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_heads": 2,
        "patch_size": patch,
        "image_size": 8 * patch,
        "out_hidden_size": hidden,
    }
    config = config_class(
        vision_config=vision if family == "glm4v_moe" else {**vision, "model_type": "glm4v_vision"},
        text_config=text,
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
        image_start_token_id=ids["<|begin_of_image|>"],
        image_end_token_id=ids["<|end_of_image|>"],
        video_start_token_id=ids["<|begin_of_video|>"],
        video_end_token_id=ids["<|end_of_video|>"],
        tie_word_embeddings=tied,
    )
    model = random_model(model_class, config, seed)
    ends = [ids[name] for name in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    save_model(folder, model, dtype, eos_token_id=ends, pad_token_id=ids["<|endoftext|>"])
    images = images_class(patch_size=patch, merge_size=2, size={"shortest_edge": min_pixels, "longest_edge": max_pixels})
    save_processor(folder, processor_class, tokenizer, images, CHAT_TEMPLATE)
    return folder
