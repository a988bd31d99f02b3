"""PaliGemma: pictures in front of a question, all of which sees itself both ways; with Gemma's decoder, or with Gemma 2's and its windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Gemma2Config, GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from .parts import make_tokenizer, random_model, save_model, save_processor, token_ids

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<image>")


def make_tiny_paligemma(
    folder: str | Path,
    *,
    second: bool = False,
    sliding_window: int = 64,
    layers: int = 2,
    image_size: int = 24,
    patch: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    hidden: int = 32,
    head_dim: int = 8,
    tied: bool = False,
) -> Path:
    """Write a random PaliGemma to `folder` and return it; `second`: a PaliGemma 2.

    A picture of any size gives (image_size // patch)² image tokens. Published folders have no chat template.
    """
    folder = Path(folder)
    places = tuple(f"<loc{index:0>4}>" for index in range(1024)) + tuple(f"<seg{index:0>3}>" for index in range(128))
    tokenizer = make_tokenizer(
        SPECIAL_TOKENS, bos="<bos>", eos="<eos>", pad="<pad>", words=places, named={"image_token": "<image>"}, padding_side="left"
    )
    ids = token_ids(tokenizer, *SPECIAL_TOKENS)
    special: dict[str, Any] = {"bos_token_id": ids["<bos>"], "pad_token_id": ids["<pad>"]}
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "eos_token_id": ids["<eos>"],
        "tie_word_embeddings": tied,
        **special,
    }
    windows: dict[str, Any] = {"query_pre_attn_scalar": head_dim, "sliding_window": sliding_window}
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=image_size,
            patch_size=patch,
            vision_use_head=False,
        ).to_dict(),
        text_config=(Gemma2Config(**text, **windows) if second else GemmaConfig(**text)).to_dict(),
        image_token_index=ids["<image>"],
        projection_dim=hidden,
        hidden_size=hidden,
        tie_word_embeddings=tied,
    )
    model = random_model(PaliGemmaForConditionalGeneration, config, seed)
    save_model(folder, model, dtype, eos_token_id=ids["<eos>"], **special)
    images = SiglipImageProcessorPil(
        size={"height": image_size, "width": image_size}, image_seq_length=(image_size // patch) ** 2
    )
    save_processor(folder, "PaliGemmaProcessor", tokenizer, images, None)
    return folder


def make_tiny_paligemma2(folder: str | Path, **options: Any) -> Path:
    """A PaliGemma 2, see `make_tiny_paligemma`."""
    return make_tiny_paligemma(folder, second=True, **options)
