"""Gemma 4: layers that share keys and values, embeddings of their own for every layer, pictures that see themselves in windowed layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4TextConfig, Gemma4VisionConfig
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from .parts import make_tokenizer, random_model, save_model, save_processor, token_ids

SPECIAL_TOKENS = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"),
    *("<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>", "<|video|>"),
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<|turn>' + role + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '\n\n<|image|>\n\n' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}{% endif %}{{ '<turn|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
)

SOUND = {"feature_extractor_type": "Gemma4AudioFeatureExtractor", "feature_size": 128, "sampling_rate": 16000}
"""Published folders have it in processor_config.json; the processor cannot do without."""


def make_tiny_gemma4(
    folder: str | Path,
    *,
    both_ways: str | None = "vision",
    sliding_window: int = 40,
    layers: int = 4,
    shared_layers: int = 2,
    per_layer: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    hidden: int = 32,
    head_dim: int = 8,
    tied: bool = False,
) -> Path:
    """Write a random Gemma 4 to `folder` and return it.

    A picture of any size gives at most 70 image tokens, the fewest that the image processor knows, which is more than the window. Every
    second text layer has full attention, with wider heads and keys for values; the last layers take keys and values of the first.
    both_ways: `use_bidirectional_attention`. per_layer: width of the embeddings that each layer has of its own, 0 = none.
    """
    folder = Path(folder)
    tokenizer = _tokenizer()
    ids = token_ids(tokenizer, *SPECIAL_TOKENS)
    special: dict[str, Any] = {"bos_token_id": ids["<bos>"], "pad_token_id": ids["<pad>"]}
    config = Gemma4Config(
        vision_config=Gemma4VisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            patch_size=4,
            pooling_kernel_size=2,
            position_embedding_size=320,
            # Published folders have it, and vLLM reads it.
            default_output_length=70,
        ),
        text_config=Gemma4TextConfig(
            vocab_size=len(tokenizer),
            vocab_size_per_layer_input=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=head_dim,
            global_head_dim=2 * head_dim,
            hidden_size_per_layer_input=per_layer,
            num_kv_shared_layers=shared_layers,
            attention_k_eq_v=True,
            max_position_embeddings=4096,
            sliding_window=sliding_window,
            layer_types=["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)],
            use_bidirectional_attention=both_ways,
            final_logit_softcapping=30.0,
            eos_token_id=ids["<eos>"],
            tie_word_embeddings=tied,
            **special,
        ),
        boi_token_id=ids["<|image>"],
        eoi_token_id=ids["<image|>"],
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
        audio_token_id=ids["<|audio|>"],
        tie_word_embeddings=tied,
    )
    model = random_model(Gemma4ForConditionalGeneration, config, seed)
    save_model(folder, model, dtype, eos_token_id=[ids["<eos>"], ids["<turn|>"]], **special)
    images = Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)
    save_processor(folder, "Gemma4Processor", tokenizer, images, CHAT_TEMPLATE, image_seq_length=70, feature_extractor=SOUND)
    return folder


def _tokenizer() -> Any:
    named = {"boi_token": "<|image>", "image_token": "<|image|>", "eoi_token": "<image|>"}
    named |= {"boa_token": "<|audio>", "audio_token": "<|audio|>", "eoa_token": "<audio|>"}
    return make_tokenizer(
        SPECIAL_TOKENS, bos="<bos>", eos="<eos>", pad="<pad>", words=("model",), named=named, padding_side="left"
    )


def tiny_gemma4_unified_config(*, sliding_window: int, both_ways: str | None = "vision") -> Any:
    """Of a model whose patches go straight to the decoder, for `from_config`: its image processor is there with torchvision alone."""
    from transformers import Gemma4UnifiedConfig

    text = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": sliding_window,
        "use_bidirectional_attention": both_ways,
        "max_position_embeddings": 4096,
    }
    vision = {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 16, "mm_posemb_size": 80, "output_proj_dims": 32}
    tokens = {"image_token_id": 90, "video_token_id": 91, "audio_token_id": 92, "boi_token_id": 93, "eoi_token_id": 94}
    return Gemma4UnifiedConfig(text_config=text, vision_config=vision, **tokens)
