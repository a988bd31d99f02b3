"""Idefics3 and SmolVLM: a picture in rows and columns of tiles, each named by a token, and the whole picture after them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3VisionConfig,
    LlamaConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMVisionConfig,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from .parts import make_tokenizer, random_model, save_model, save_processor, token_ids

_PICTURE_TOKENS = (
    *("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
IDEFICS3_SPECIAL_TOKENS = ("<unk>", "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", *_PICTURE_TOKENS)
SMOLVLM_SPECIAL_TOKENS = ("<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", *_PICTURE_TOKENS)

_TURNS = (
    "{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
IDEFICS3_CHAT_TEMPLATE = "<|begin_of_text|>" + _TURNS
SMOLVLM_CHAT_TEMPLATE = "<|im_start|>" + _TURNS


def make_tiny_idefics3(
    folder: str | Path,
    *,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    image_size: int = 48,
    patch: int = 12,
    tiles: int = 2,
    splitting: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    hidden: int = 32,
    tied: bool = False,
) -> Path:
    """Write a random Idefics3 to `folder` and return it.

    A tile of image_size² pixels gives (image_size // 2 patch)² image tokens. A picture's longer side is always `tiles` tiles; without
    `splitting` it is one tile.
    """
    folder = Path(folder)
    tokenizer = make_tokenizer(
        IDEFICS3_SPECIAL_TOKENS,
        bos="<|begin_of_text|>",
        eos="<end_of_utterance>",
        pad="<|finetune_right_pad_id|>",
        words=("User", "Assistant"),
    )
    ids = token_ids(tokenizer, *IDEFICS3_SPECIAL_TOKENS)
    special: dict[str, Any] = {"bos_token_id": ids["<|begin_of_text|>"], "pad_token_id": ids["<|finetune_right_pad_id|>"]}
    config = Idefics3Config(
        vision_config=Idefics3VisionConfig(**_vision(hidden, image_size, patch)),
        text_config=_text(len(tokenizer), layers, heads, kv_heads, hidden, tied, eos_token_id=ids["<|end_of_text|>"], **special),
        image_token_id=ids["<image>"],
        scale_factor=2,
        tie_word_embeddings=tied,
        # As published; no field of the class, which is why it is passed on like this.
        **{"pad_token_id": special["pad_token_id"]},
    )
    model = random_model(Idefics3ForConditionalGeneration, config, seed)
    save_model(folder, model, dtype, eos_token_id=[ids["<end_of_utterance>"], ids["<|end_of_text|>"]], **special)
    image_processor = Idefics3ImageProcessorPil(**_image(image_size, tiles, splitting))
    length = (image_size // patch // 2) ** 2
    save_processor(folder, "Idefics3Processor", tokenizer, image_processor, IDEFICS3_CHAT_TEMPLATE, image_seq_len=length)
    return folder


def make_tiny_smolvlm(
    folder: str | Path,
    *,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    image_size: int = 48,
    patch: int = 8,
    tiles: int = 2,
    splitting: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    hidden: int = 32,
    tied: bool = False,
) -> Path:
    """Write a random SmolVLM to `folder` and return it. As Idefics3, but that three patches by three make an image token."""
    folder = Path(folder)
    tokenizer = make_tokenizer(
        SMOLVLM_SPECIAL_TOKENS,
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        pad="<|im_end|>",
        adds_bos=False,
        words=("User", "Assistant"),
        named={
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
    )
    ids = token_ids(tokenizer, *SMOLVLM_SPECIAL_TOKENS)
    special: dict[str, Any] = {"bos_token_id": ids["<|im_start|>"], "pad_token_id": ids["<|im_end|>"]}
    config = SmolVLMConfig(
        vision_config=SmolVLMVisionConfig(**_vision(hidden, image_size, patch)),
        text_config=_text(len(tokenizer), layers, heads, kv_heads, hidden, tied, eos_token_id=ids["<|im_end|>"], **special),
        image_token_id=ids["<image>"],
        scale_factor=3,
        tie_word_embeddings=tied,
        **{"pad_token_id": special["pad_token_id"]},
    )
    model = random_model(SmolVLMForConditionalGeneration, config, seed)
    save_model(folder, model, dtype, eos_token_id=ids["<end_of_utterance>"], **special)
    image_processor = SmolVLMImageProcessorPil(**_image(image_size, tiles, splitting))
    length = (image_size // patch // 3) ** 2
    save_processor(folder, "SmolVLMProcessor", tokenizer, image_processor, SMOLVLM_CHAT_TEMPLATE, image_seq_len=length)
    return folder


def _vision(hidden: int, image_size: int, patch: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch,
    }


def _text(vocabulary: int, layers: int, heads: int, kv_heads: int, hidden: int, tied: bool, **special: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        **special,
    )


def _image(image_size: int, tiles: int, splitting: bool) -> dict[str, Any]:
    return {
        "size": {"longest_edge": tiles * image_size},
        "max_image_size": {"longest_edge": image_size},
        "do_image_splitting": splitting,
    }
