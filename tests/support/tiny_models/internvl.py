"""InternVL (3): a picture in tiles of its aspect ratio, and itself as a thumbnail after them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from .parts import make_tokenizer, random_model, save_model, save_processor, token_ids

SPECIAL_TOKENS = (
    *("<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny_internvl(
    folder: str | Path,
    *,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    image_size: int = 48,
    patch: int = 8,
    max_tiles: int = 6,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    hidden: int = 32,
    tied: bool = False,
) -> Path:
    """Write a random InternVL on Qwen2 to `folder` and return it.

    A tile gives (image_size // 2 patch)² image tokens. A picture of more than one tile has a thumbnail too, so it is three tiles or
    more; `<img>` and `</img>` stand around the picture's tokens.
    """
    folder = Path(folder)
    tokenizer = make_tokenizer(
        SPECIAL_TOKENS,
        bos=None,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    ids = token_ids(tokenizer, *SPECIAL_TOKENS)
    length = (image_size // patch // 2) ** 2
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_bias=True,
            image_size=[image_size, image_size],
            patch_size=[patch, patch],
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
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=length,
        downsample_ratio=0.5,
        tie_word_embeddings=tied,
    )
    model = random_model(InternVLForConditionalGeneration, config, seed)
    save_model(folder, model, dtype, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"])
    image_processor = GotOcr2ImageProcessorPil(
        size={"height": image_size, "width": image_size}, min_patches=1, max_patches=max_tiles
    )
    save_processor(folder, "InternVLProcessor", tokenizer, image_processor, CHAT_TEMPLATE, image_seq_length=length)
    return folder
