"""Mllama (Llama 3.2 Vision): one token a picture; some text layers attend to the picture's tiles instead of the text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration, PreTrainedModel
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from .parts import make_tokenizer, random_model, save_model, save_processor, token_ids

SPECIAL_TOKENS = (
    *("<unk>", "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"),
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<|image|>' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def make_tiny_mllama(
    folder: str | Path,
    *,
    layers: int = 5,
    heads: int = 4,
    kv_heads: int = 2,
    image_size: int = 48,
    patch: int = 12,
    cross_attention_layers: Sequence[int] = (1, 3),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    hidden: int = 32,
    tied: bool = False,
) -> Path:
    """Write a random Mllama to `folder` and return it.

    A picture is one to four tiles of (image_size // patch)² + 1 vision tokens. As published, `<|image|>` is the id after the last of
    the output's: the embedding has rows that the head has not. So `tied` is no choice here: it raises ValueError.
    """
    if tied:
        raise ValueError("tied: Mllama's embedding has more rows than its head")
    folder = Path(folder)
    tokenizer = make_tokenizer(
        SPECIAL_TOKENS,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad="<|finetune_right_pad_id|>",
        words=("system",),
        last=("<|image|>",),
    )
    ids = token_ids(tokenizer, *SPECIAL_TOKENS, "<|image|>")
    ends = [ids["<|end_of_text|>"], ids["<|eot_id|>"]]
    special: dict[str, Any] = {"bos_token_id": ids["<|begin_of_text|>"], "pad_token_id": ids["<|finetune_right_pad_id|>"]}
    config = MllamaConfig(
        vision_config=MllamaVisionConfig(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_global_layers=1,
            attention_heads=2,
            image_size=image_size,
            patch_size=patch,
            max_num_tiles=4,
            # The output and the first layer's, side by side.
            intermediate_layers_indices=[0],
            vision_output_dim=2 * hidden,
        ),
        text_config=MllamaTextConfig(
            vocab_size=ids["<|image|>"],
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=4096,
            cross_attention_layers=list(cross_attention_layers),
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            eos_token_id=ends,
            **special,
        ),
        image_token_index=ids["<|image|>"],
    )
    model = random_model(MllamaForConditionalGeneration, config, seed)
    _open_gates(model)
    save_model(folder, model, dtype, eos_token_id=ends, **special)
    image_processor = MllamaImageProcessorPil(size={"height": image_size, "width": image_size}, max_image_tiles=4)
    save_processor(folder, "MllamaProcessor", tokenizer, image_processor, CHAT_TEMPLATE)
    return folder


def _open_gates(model: PreTrainedModel) -> None:
    """Gates start at zero or near it, and a picture then changes nothing."""
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in ("cross_attn_attn_gate", "cross_attn_mlp_gate", "gate", "gate_attn", "gate_ffn"):
            torch.nn.init.constant_(parameter, 0.7)
