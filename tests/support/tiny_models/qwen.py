"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: a picture of any size, image tokens by its grid, three-axis positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .parts import make_tokenizer, random_model, save_model, token_ids

QWEN_SPECIAL_TOKENS = (
    *("<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)

_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nanswer with one word .<|im_end|>\n' }}{% endif %}"
_TURNS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_CHAT_TEMPLATE = _SYSTEM + _TURNS
QWEN3_CHAT_TEMPLATE = _TURNS
"""Qwen3-VL has no system turn of its own."""


def make_tiny_qwen(
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
    sliding_window: int | None = None,
    tied: bool = False,
) -> Path:
    """Write a random Qwen2.5-VL to `folder`, with the files of a published one, and return it.

    Two patches by two make an image token, so a picture of H x W pixels gives about (H / 2 patch) (W / 2 patch) of them. The first
    vision block attends in windows of two by two tokens. sliding_window: of all text layers but the first.
    """
    folder = Path(folder)
    tokenizer = _tokenizer(QWEN_CHAT_TEMPLATE)
    ids = token_ids(tokenizer, *QWEN_SPECIAL_TOKENS)
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_heads": 2,
            "patch_size": patch,
            "window_size": 4 * patch,
            "fullatt_block_indexes": [1],
            "out_hidden_size": hidden,
        },
        text_config={
            **_text(tokenizer, ids, layers, heads, kv_heads, hidden, tied),
            **_window(sliding_window),
        },
        **_picture_ids(ids),
        **_tied(tied),
    )
    model = random_model(Qwen2_5_VLForConditionalGeneration, config, seed)
    _save(folder, model, dtype, tokenizer, ids, patch=patch, min_pixels=min_pixels, max_pixels=max_pixels)
    return folder


def make_tiny_qwen2_vl(
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
    sliding_window: int | None = None,
    tied: bool = False,
) -> Path:
    """Write a random Qwen2-VL to `folder` and return it. As Qwen2.5-VL, but that every vision block attends to the whole picture."""
    folder = Path(folder)
    tokenizer = _tokenizer(QWEN_CHAT_TEMPLATE)
    ids = token_ids(tokenizer, *QWEN_SPECIAL_TOKENS)
    config = Qwen2VLConfig(
        # hidden_size: of the text model, which the merger writes to.
        vision_config={
            "depth": 2,
            "embed_dim": hidden,
            "hidden_size": hidden,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": patch,
        },
        text_config={
            **_text(tokenizer, ids, layers, heads, kv_heads, hidden, tied),
            **_window(sliding_window),
        },
        **_picture_ids(ids),
        **_tied(tied),
    )
    model = random_model(Qwen2VLForConditionalGeneration, config, seed)
    _save(folder, model, dtype, tokenizer, ids, patch=patch, min_pixels=min_pixels, max_pixels=max_pixels)
    return folder


def make_tiny_qwen3_vl(folder: str | Path, **options: Any) -> Path:
    """Write a random Qwen3-VL to `folder` and return it.

    The first two of three vision blocks also go into the text model's first two layers (deepstack), so `layers` is two or more.
    """
    return _qwen3(Path(folder), Qwen3VLConfig, Qwen3VLForConditionalGeneration, {}, **options)


def make_tiny_qwen3_vl_moe(folder: str | Path, *, experts: int = 4, taken: int = 2, width: int = 32, **options: Any) -> Path:
    """Write a random Qwen3-VL with experts to `folder` and return it. taken: experts a token takes. width: of an expert.

    By default their second weight is square: nothing tells it from its transpose but its name.
    """
    # The last one is a default of transformers alone: published folders have it, and vLLM reads it.
    text = {"num_experts": experts, "num_experts_per_tok": taken, "moe_intermediate_size": width, "norm_topk_prob": True}
    return _qwen3(Path(folder), Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, text, **options)


def _qwen3(
    folder: Path,
    config_class: Any,
    model_class: Any,
    text_options: dict[str, Any],
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
    tokenizer = _tokenizer(QWEN3_CHAT_TEMPLATE)
    ids = token_ids(tokenizer, *QWEN_SPECIAL_TOKENS)
    text = _text(tokenizer, ids, layers, heads, kv_heads, hidden, tied)
    text["rope_parameters"]["mrope_interleaved"] = True
    config = config_class(
        vision_config={
            "depth": 3,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_heads": 2,
            "patch_size": patch,
            "out_hidden_size": hidden,
            # A grid of 8 by 8 positions, interpolated to the picture's.
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config={**text, "head_dim": hidden // heads, **text_options},
        **_picture_ids(ids),
        **_tied(tied),
    )
    model = random_model(model_class, config, seed)
    mean = [0.5, 0.5, 0.5]
    options = {"image_mean": mean, "image_std": mean}
    _save(folder, model, dtype, tokenizer, ids, patch=patch, min_pixels=min_pixels, max_pixels=max_pixels, **options)
    return folder


def _tokenizer(chat_template: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(QWEN_SPECIAL_TOKENS, bos=None, eos="<|im_end|>", pad="<|endoftext|>")
    tokenizer.chat_template = chat_template
    return tokenizer


def _text(
    tokenizer: PreTrainedTokenizerFast, ids: dict[str, int], layers: int, heads: int, kv_heads: int, hidden: int, tied: bool
) -> dict[str, Any]:
    axis = max(1, hidden // heads // 8)
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        # Time, height and width share the rotary frequencies of a head.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [hidden // heads // 2 - 2 * axis, axis, axis],
        },
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        **_tied(tied),
    }


def _window(sliding_window: int | None) -> dict[str, Any]:
    return {"use_sliding_window": sliding_window is not None, "sliding_window": sliding_window, "max_window_layers": 1}


def _tied(tied: bool) -> dict[str, Any]:
    # Left out where it is not asked for, so that a config's own default is what gets written.
    return {"tie_word_embeddings": True} if tied else {}


def _picture_ids(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def _save(
    folder: Path,
    model: PreTrainedModel,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerFast,
    ids: dict[str, int],
    *,
    patch: int,
    min_pixels: int,
    max_pixels: int,
    **image: Any,
) -> None:
    ends = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    save_model(folder, model, dtype, eos_token_id=ends, pad_token_id=ids["<|endoftext|>"])
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, size=size, **image).save_pretrained(folder)
