"""LLaVA-NeXT (1.6): the whole picture and its tiles, a newline token at the end of each row of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from .parts import make_tokenizer, random_model, save_model, save_processor, token_ids

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")

# As published: a turn's pictures come before its text.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}"
    "{% endif %}{% endfor %}"
)


def make_tiny_llava_next(
    folder: str | Path,
    *,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    image_size: int = 48,
    patch: int = 12,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    hidden: int = 32,
    sliding_window: int | None = None,
    tied: bool = False,
) -> Path:
    """Write a random LLaVA-NeXT on Mistral to `folder` and return it.

    A tile is image_size² pixels and (image_size // patch)² tokens; a picture is itself as one tile, and one by two, two by one or
    two by two tiles without the rows and columns that only pad them.
    """
    folder = Path(folder)
    grids = [[image_size, 2 * image_size], [2 * image_size, image_size], [2 * image_size, 2 * image_size]]
    tokenizer = make_tokenizer(SPECIAL_TOKENS, words=("INST", "SYS"), padding_side="left")
    ids = token_ids(tokenizer, *SPECIAL_TOKENS)
    special: dict[str, Any] = {"bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"], "pad_token_id": ids["<pad>"]}
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=image_size,
            patch_size=patch,
        ),
        text_config=MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=4096,
            sliding_window=sliding_window,
            tie_word_embeddings=tied,
            **special,
        ),
        image_token_index=ids["<image>"],
        image_grid_pinpoints=grids,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(image_size // patch) ** 2,
        tie_word_embeddings=tied,
    )
    model = random_model(LlavaNextForConditionalGeneration, config, seed)
    save_model(folder, model, dtype, **special)
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_grid_pinpoints=grids,
    )
    save_processor(
        folder,
        "LlavaNextProcessor",
        tokenizer,
        image_processor,
        CHAT_TEMPLATE,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    return folder
