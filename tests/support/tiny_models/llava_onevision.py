"""LLaVA-OneVision: one picture in tiles, several as one tile each."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from .parts import make_tokenizer, random_model, save_model, save_processor, token_ids

SPECIAL_TOKENS = ("<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")

# As published: a turn's pictures come before its text.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny_llava_onevision(
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
    tied: bool = False,
) -> Path:
    """Write a random LLaVA-OneVision on Qwen2 to `folder` and return it.

    A prompt's only picture is itself as one tile of (image_size // patch)² tokens, and up to two by two tiles with a newline token
    a row; where a prompt has several, each is the one tile, padded to a square, and a newline token.
    """
    folder = Path(folder)
    grids = [[row * image_size, column * image_size] for row in (1, 2) for column in (1, 2)]
    tokenizer = make_tokenizer(SPECIAL_TOKENS, bos=None, eos="<|im_end|>", pad="<|endoftext|>")
    ids = token_ids(tokenizer, *SPECIAL_TOKENS)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=image_size,
            patch_size=patch,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=4096,
            bos_token_id=ids["<|endoftext|>"],
            eos_token_id=ids["<|im_end|>"],
            tie_word_embeddings=tied,
        ),
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=grids,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=tied,
    )
    model = random_model(LlavaOnevisionForConditionalGeneration, config, seed)
    save_model(folder, model, dtype, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"])
    image_processor = LlavaOnevisionImageProcessorPil(
        size={"height": image_size, "width": image_size}, image_grid_pinpoints=grids
    )
    save_processor(
        folder,
        "LlavaOnevisionProcessor",
        tokenizer,
        image_processor,
        CHAT_TEMPLATE,
        num_image_tokens=(image_size // patch) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        image_token="<image>",
        video_token="<video>",
    )
    return folder
