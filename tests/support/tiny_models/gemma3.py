"""Gemma 3: soft tokens that see each other both ways, and text layers with a sliding window between the full ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from .parts import make_tokenizer, random_model, save_model, save_processor, token_ids

SPECIAL_TOKENS = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% if messages[0]['content'] is string %}{% set prefix = messages[0]['content'] + '\n\n' %}"
    "{% else %}{% set prefix = messages[0]['content'][0]['text'] + '\n\n' %}{% endif %}{% set turns = messages[1:] %}"
    "{% else %}{% set prefix = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

_WORDS = ("model", "Here", "here", "original", "some", "crops", "help", "you", "see", "better")


def make_tiny_gemma3(
    folder: str | Path,
    *,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    image_size: int = 48,
    patch: int = 8,
    sliding_window: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    hidden: int = 32,
    vision_hidden: int | None = None,
    tied: bool = False,
) -> Path:
    """Write a random Gemma 3 to `folder` and return it.

    A picture of any size gives (image_size // 2 patch)² soft tokens. Every second text layer has full attention, the others the
    sliding window. Pan and scan is asked for in the processor's call: its own default wins over the folder's.
    """
    folder = Path(folder)
    # Indices as published: padding is 0, the end 1, the start 2.
    tokenizer = make_tokenizer(
        SPECIAL_TOKENS,
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        # The first three are in published vocabularies, where vLLM looks for them.
        words=("\n\n", "\n\n\n", "\n\n\n\n", *_WORDS),
        named={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        padding_side="left",
    )
    ids = token_ids(tokenizer, *SPECIAL_TOKENS)
    special: dict[str, Any] = {"bos_token_id": ids["<bos>"], "pad_token_id": ids["<pad>"]}
    ends = [ids["<eos>"], ids["<end_of_turn>"]]
    length = (image_size // patch // 2) ** 2
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(
            hidden_size=vision_hidden or hidden,
            intermediate_size=2 * (vision_hidden or hidden),
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=image_size,
            patch_size=patch,
            vision_use_head=False,
        ),
        text_config=Gemma3TextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=hidden // heads,
            query_pre_attn_scalar=hidden // heads,
            max_position_embeddings=4096,
            sliding_window=sliding_window,
            layer_types=["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)],
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            },
            eos_token_id=ids["<eos>"],
            tie_word_embeddings=tied,
            **special,
        ),
        mm_tokens_per_image=length,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
        tie_word_embeddings=tied,
    )
    model = random_model(Gemma3ForConditionalGeneration, config, seed)
    save_model(folder, model, dtype, eos_token_id=ends, **special)
    image_processor = Gemma3ImageProcessorPil(size={"height": image_size, "width": image_size})
    save_processor(folder, "Gemma3Processor", tokenizer, image_processor, CHAT_TEMPLATE, image_seq_length=length)
    return folder
