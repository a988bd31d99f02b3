"""LLaVA 1.5: one square picture, a fixed number of image tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .parts import SPECIAL_TOKENS, make_tokenizer, random_model, save_model, token_ids

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] if content['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def make_tiny_llava(
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
    chat_template: bool = True,
    tied: bool = False,
) -> Path:
    """Write a random LLaVA and its processor to `folder` and return it.

    A picture gives (image_size // patch)² tokens. Weights are wider than the usual initialisation (0.2) so that attention and
    next-token distributions are far from uniform, as a trained model's are.
    """
    folder = Path(folder)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
        ),
        tokenizer=make_tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE if chat_template else None,
    )
    vocabulary = len(processor.tokenizer)
    ids = token_ids(processor.tokenizer, *SPECIAL_TOKENS)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=image_size,
            patch_size=patch,
        ),
        text_config=LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=4096,
            initializer_range=0.2,
            bos_token_id=ids["<s>"],
            eos_token_id=ids["</s>"],
            pad_token_id=ids["<pad>"],
            tie_word_embeddings=tied,
        ),
        image_token_index=ids["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(image_size // patch) ** 2,
        tie_word_embeddings=tied,
    )
    model = random_model(LlavaForConditionalGeneration, config, seed)
    save_model(folder, model, dtype, bos_token_id=ids["<s>"], eos_token_id=ids["</s>"], pad_token_id=ids["<pad>"])
    processor.save_pretrained(folder)
    return folder
