"""MiniCPM-V 4.6 and 4.7: a picture and its slices, patches merged four by four, Qwen3.5's text model."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3_5TextConfig

from .parts import make_tokenizer, random_model, save_model, save_processor, token_ids
from .qwen import QWEN3_CHAT_TEMPLATE, _text
from .qwen3_5 import text_settings

SPECIAL_TOKENS = ("<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
NAMED = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
CHAT_TEMPLATE = QWEN3_CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>")


def make_tiny_minicpmv4_6(folder: str | Path, **options: Any) -> Path:
    """Write a random MiniCPM-V 4.6 to `folder` and return it. options: of `_make`."""
    return _make(Path(folder), "MiniCPMV4_6", {}, **options)


def make_tiny_minicpmv4_7(folder: str | Path, **options: Any) -> Path:
    """Write a random MiniCPM-V 4.7, whose positions lie on a canvas, to `folder` and return it."""
    names = {"image_start_id": "<image>", "image_end_id": "</image>", "slice_start_id": "<slice>", "slice_end_id": "</slice>"}
    return _make(Path(folder), "MiniCPMV4_7", {**names, "newline_id": "\n"}, **options)


def _make(
    folder: Path,
    name: str,
    marks: dict[str, str],
    *,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    patch: int = 4,
    side: int = 64,
    slices: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    hidden: int = 32,
    tied: bool = False,
) -> Path:
    """A picture of more than side * side pixels is cut into up to `slices` slices. marks: setting -> token whose id it is."""
    package = importlib.import_module("transformers")
    tokenizer = make_tokenizer(SPECIAL_TOKENS, bos=None, eos="<|im_end|>", pad="<|endoftext|>", named=NAMED)
    ids = token_ids(tokenizer, *SPECIAL_TOKENS, *NAMED.values())
    text = _text(tokenizer, ids, layers, heads, kv_heads, hidden, tied)
    config = getattr(package, f"{name}Config")(
        vision_config={
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": side,
            "patch_size": patch,
        },
        text_config=Qwen3_5TextConfig(**text_settings(text)),
        insert_layer_id=0,
        image_size=side,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        tie_word_embeddings=tied,
        **{setting: int(tokenizer.convert_tokens_to_ids(token)) for setting, token in marks.items()},
    )
    model = random_model(getattr(package, f"{name}ForConditionalGeneration"), config, seed)
    save_model(folder, model, dtype, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"])
    module = importlib.import_module("transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6")
    images = module.MiniCPMV4_6ImageProcessorPil(scale_resolution=side, patch_size=patch, max_slice_nums=slices)
    save_processor(folder, f"{name}Processor", tokenizer, images, CHAT_TEMPLATE)
    return folder
