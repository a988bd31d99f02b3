"""Mistral 3 and Pixtral: a picture of any size, a break token after each row of its tokens and an end token after the last."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from .parts import make_tokenizer, random_model, save_model, save_processor, token_ids

SPECIAL_TOKENS = (
    *("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    *("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ends = ('[SYSTEM_PROMPT]', '[/SYSTEM_PROMPT]') %}"
    "{% elif message['role'] == 'user' %}{% set ends = ('[INST]', '[/INST]') %}{% else %}{% set ends = ('', eos_token) %}{% endif %}"
    "{{ ends[0] }}{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% elif part['type'] in ('image', 'image_url') %}{{ '[IMG]' }}{% endif %}"
    "{% endfor %}{% endif %}{{ ends[1] }}{% endfor %}"
)


def make_tiny_mistral3(
    folder: str | Path,
    *,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    patch: int = 6,
    max_size: int = 96,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    hidden: int = 32,
    sliding_window: int | None = None,
    tied: bool = False,
) -> Path:
    """Write a random Mistral 3 to `folder` and return it.

    Two patches by two make an image token, so a picture of H x W pixels is H / 2 patch rows of W / 2 patch tokens and one more.
    Sides longer than max_size pixels are shrunk.
    """
    folder = Path(folder)
    tokenizer = _tokenizer()
    ids = token_ids(tokenizer, *SPECIAL_TOKENS)
    config = Mistral3Config(
        vision_config=_vision(hidden, patch, max_size),
        text_config=_text(tokenizer, ids, layers, heads, kv_heads, hidden, sliding_window, tied),
        image_token_index=ids["[IMG]"],
        spatial_merge_size=2,
        vision_feature_layer=-1,
        tie_word_embeddings=tied,
    )
    _save(folder, random_model(Mistral3ForConditionalGeneration, config, seed), dtype, tokenizer, ids, patch, max_size, merge=2)
    return folder


def make_tiny_pixtral(
    folder: str | Path,
    *,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    patch: int = 12,
    max_size: int = 96,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    hidden: int = 32,
    sliding_window: int | None = None,
    tied: bool = False,
) -> Path:
    """Write a random Pixtral to `folder` and return it: LLaVA's model with Pixtral's vision tower, a patch an image token."""
    folder = Path(folder)
    tokenizer = _tokenizer()
    ids = token_ids(tokenizer, *SPECIAL_TOKENS)
    config = LlavaConfig(
        vision_config=_vision(hidden, patch, max_size),
        text_config=_text(tokenizer, ids, layers, heads, kv_heads, hidden, sliding_window, tied),
        image_token_index=ids["[IMG]"],
        image_seq_length=1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=tied,
    )
    _save(folder, random_model(LlavaForConditionalGeneration, config, seed), dtype, tokenizer, ids, patch, max_size, merge=1)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(SPECIAL_TOKENS)


def _vision(hidden: int, patch: int, max_size: int) -> PixtralVisionConfig:
    return PixtralVisionConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=max_size,
        patch_size=patch,
    )


def _text(
    tokenizer: PreTrainedTokenizerFast,
    ids: dict[str, int],
    layers: int,
    heads: int,
    kv_heads: int,
    hidden: int,
    sliding_window: int | None,
    tied: bool,
) -> MistralConfig:
    return MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=4096,
        sliding_window=sliding_window,
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        pad_token_id=ids["<pad>"],
        tie_word_embeddings=tied,
    )


def _save(
    folder: Path,
    model: PreTrainedModel,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerFast,
    ids: dict[str, int],
    patch: int,
    max_size: int,
    *,
    merge: int,
) -> None:
    save_model(folder, model, dtype, bos_token_id=ids["<s>"], eos_token_id=ids["</s>"], pad_token_id=ids["<pad>"])
    image_processor = PixtralImageProcessorPil(size={"longest_edge": max_size}, patch_size={"height": patch, "width": patch})
    save_processor(
        folder,
        "PixtralProcessor",
        tokenizer,
        image_processor,
        CHAT_TEMPLATE,
        patch_size=patch,
        spatial_merge_size=merge,
        image_token="[IMG]",
        image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
    )
