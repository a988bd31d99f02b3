"""Qwen3.5 and its mixture of experts: Qwen3-VL's pictures, three of four text layers Gated DeltaNet, one with gated attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers, trainers
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5Tokenizer,
)

from .parts import WORDS, random_model, token_ids
from .qwen import QWEN3_CHAT_TEMPLATE, QWEN_SPECIAL_TOKENS, _picture_ids, _save, _text, _tied


def make_tiny_qwen3_5(folder: str | Path, **options: Any) -> Path:
    """Write a random Qwen3.5 to `folder` and return it. options: of `_make`."""
    return _make(Path(folder), Qwen3_5Config, Qwen3_5ForConditionalGeneration, {}, **options)


def make_tiny_qwen3_5_moe(folder: str | Path, *, experts: int = 4, **options: Any) -> Path:
    """Write a random Qwen3.5 with experts in every layer, two a token beside the shared one, to `folder` and return it."""
    moe = {
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    return _make(Path(folder), Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration, moe, **options)


def _make(
    folder: Path,
    config_class: Any,
    model_class: Any,
    text: dict[str, Any],
    *,
    layers: int = 4,
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
    tokenizer = _tokenizer()
    ids = token_ids(tokenizer, *QWEN_SPECIAL_TOKENS[1:])
    config = config_class(
        vision_config={
            "depth": 2,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_heads": 2,
            "patch_size": patch,
            "out_hidden_size": hidden,
            # A grid of 8 by 8 positions, interpolated to the picture's.
            "num_position_embeddings": 64,
        },
        text_config={
            **text_settings(_text(tokenizer, ids, layers, heads, kv_heads, hidden, tied)),
            **text,
        },
        **_picture_ids(ids),
        **_tied(tied),
    )
    model = random_model(model_class, config, seed)
    mean = [0.5, 0.5, 0.5]
    options = {"image_mean": mean, "image_std": mean}
    _save(folder, model, dtype, tokenizer, ids, patch=patch, min_pixels=min_pixels, max_pixels=max_pixels, **options)
    return folder


def text_settings(text: dict[str, Any]) -> dict[str, Any]:
    """Settings of a text model as Qwen3.5 has them: every fourth layer attends, with half of each head rotated; the others carry a state for
    each of four value heads."""
    head_dim = max(16, text["hidden_size"] // text["num_attention_heads"])
    return {
        **text,
        "head_dim": head_dim,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [head_dim // 8, head_dim // 16, head_dim // 16],
            "mrope_interleaved": True,
        },
        "layer_types": ["full_attention" if layer % 4 == 3 else "linear_attention" for layer in range(text["num_hidden_layers"])],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }


def _tokenizer() -> Any:
    """Qwen3.5's class, bytes merged to the words that the other tiny models know: whatever a folder says, it is loaded as this class."""
    plain = Qwen3_5Tokenizer()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    plain.backend_tokenizer.train_from_iterator([f"{word} {word}" for word in WORDS.split()], trainer)
    trained = json.loads(plain.backend_tokenizer.to_str())["model"]
    tokenizer = Qwen3_5Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        eos_token="<|im_end|>",
        extra_special_tokens=[token for token in QWEN_SPECIAL_TOKENS if token != "<unk>"],
    )
    tokenizer.chat_template = QWEN3_CHAT_TEMPLATE
    return tokenizer
