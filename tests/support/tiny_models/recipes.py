"""Families that need no maker of their own: one maker of tiny checkpoints for all of them, and what is special to each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from .parts import make_byte_tokenizer, make_tokenizer, random_model, save_model, save_processor, token_ids

_BASE = ("<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
HIDDEN, HEADS, LAYERS = 32, 4, 3

_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'MARK' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a family's tiny checkpoint is made of."""

    name: str
    """Of its classes, before `Config`, `ForConditionalGeneration` and `Processor`."""
    image: str
    """The token of a picture's feature, and the name of its id in the configuration."""
    images: tuple[str, str, dict[str, Any]]
    """Module and class of the image processor, below `transformers.models`, and its settings."""
    vision: dict[str, Any]
    text: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    mark: str = ""
    """What the chat template writes for a picture; "": the image token."""
    others: tuple[str, ...] = ()
    """Further special tokens."""
    named: dict[str, str] = field(default_factory=dict)
    """Attribute of the tokenizer -> special token."""
    ids: dict[str, str | tuple[str, ...]] = field(default_factory=dict)
    """Name in the configuration -> the token or tokens whose ids it has."""
    tokenizer: str = ""
    """Its class, where transformers takes a family's own whatever the folder says: of bytes, and not of words."""
    processor: str = ""
    """The class of the processor, where it is not of the family's name."""
    values: dict[str, Any] = field(default_factory=dict)
    """Of processor_config.json."""

    @property
    def needs_torchvision(self) -> bool:
        """Whether transformers has the family's image processor for torchvision only."""
        return not self.images[1].endswith("Pil")


def _siglip(**other: Any) -> dict[str, Any]:
    return {"model_type": "siglip_vision_model", **_tower(), "vision_use_head": False, **other}


def _tower(patch: int = 8, image: int = 48) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image,
        "patch_size": patch,
    }


_QWEN_MARKS = ("<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
_QWEN_IDS: dict[str, str | tuple[str, ...]] = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
_PIXELS = {"shortest_edge": 24 * 24, "longest_edge": 96 * 96}
_SQUARE = {"height": 48, "width": 48}
_CLIP = ("clip.image_processing_pil_clip", "CLIPImageProcessorPil", {"size": {"shortest_edge": 48}, "crop_size": _SQUARE})
_TILES = (
    "got_ocr2.image_processing_pil_got_ocr2",
    "GotOcr2ImageProcessorPil",
    {"size": _SQUARE, "min_patches": 1, "max_patches": 6},
)
_PINPOINTS = [[48, 96], [96, 48], [96, 96]]
_LLAVA_NEXT = (
    "llava_next.image_processing_pil_llava_next",
    "LlavaNextImageProcessorPil",
    {"size": {"shortest_edge": 48}, "crop_size": _SQUARE, "image_grid_pinpoints": _PINPOINTS},
)
_CLIP_TOWER = {"model_type": "clip_vision_model", **_tower(12), "projection_dim": HIDDEN}
_LLAVA_VALUES = {"patch_size": 12, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
_COHERE = {"model_type": "cohere2", "sliding_window": 16, "logit_scale": 0.25}

_OMNI: dict[str, Any] = {
    "image": "<|IMAGE|>",
    "mark": "<|vision_bos|><|IMAGE|><|vision_eos|>",
    "images": ("qwen2_vl.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil", {"patch_size": 6, "size": _PIXELS}),
    "others": ("<|AUDIO|>", "<|VIDEO|>", "<|vision_bos|>", "<|vision_eos|>", "<|audio_bos|>", "<|audio_eos|>"),
    "named": {
        "image_token": "<|IMAGE|>",
        "audio_token": "<|AUDIO|>",
        "video_token": "<|VIDEO|>",
        "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
    },
    "ids": {
        "image_token_id": "<|IMAGE|>",
        "audio_token_id": "<|AUDIO|>",
        "video_token_id": "<|VIDEO|>",
        "vision_start_token_id": "<|vision_bos|>",
        "vision_end_token_id": "<|vision_eos|>",
        "audio_start_token_id": "<|audio_bos|>",
        "audio_end_token_id": "<|audio_eos|>",
    },
    "values": {"feature_extractor": {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 16}},
}

RECIPES: dict[str, Recipe] = {
    "aria": Recipe(
        name="Aria",
        image="<|img|>",
        # The processor asks for pictures of 980 pixels a side.
        images=("aria.image_processing_pil_aria", "AriaImageProcessorPil", {"max_image_size": 980}),
        vision={"model_type": "idefics3_vision", **_tower(140, 980)},
        text={"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
        config={"projector_patch_to_query_dict": {49: 4}},
        named={"image_token": "<|img|>"},
        ids={"image_token_index": "<|img|>"},
        values={"size_conversion": {980: 4}},
    ),
    "aya_vision": Recipe(
        name="AyaVision",
        image="<|IMG_PATCH|>",
        mark="<image>",
        images=_TILES,
        vision=_siglip(),
        text=_COHERE,
        config={"downsample_factor": 2},
        others=("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "TILE", "TILE_GLOBAL"),
        ids={"image_token_index": "<|IMG_PATCH|>"},
        values={"patch_size": 8, "img_size": 48, "downsample_factor": 2},
    ),
    "cohere2_vision": Recipe(
        name="Cohere2Vision",
        image="<|IMG_PATCH|>",
        images=(
            "cohere2_vision.image_processing_cohere2_vision",
            "Cohere2VisionImageProcessor",
            {"size": _SQUARE, "max_patches": 6, "patch_size": 3},
        ),
        vision=_siglip(),
        text=_COHERE,
        config={"downsample_factor": 2, "alignment_intermediate_size": 64},
        others=("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>"),
        named={
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "image_token": "<|IMG_PATCH|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
        ids={"image_token_id": "<|IMG_PATCH|>"},
    ),
    "deepseek_vl": Recipe(
        name="DeepseekVL",
        image="<image_placeholder>",
        images=("deepseek_vl.image_processing_pil_deepseek_vl", "DeepseekVLImageProcessorPil", {"size": _SQUARE}),
        vision=_siglip(),
        text={"model_type": "llama"},
        named={"image_token": "<image_placeholder>"},
        ids={"image_token_id": "<image_placeholder>"},
        values={"num_image_tokens": 36},
    ),
    "deepseek_vl_hybrid": Recipe(
        name="DeepseekVLHybrid",
        image="<image_placeholder>",
        images=(
            "deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid",
            "DeepseekVLHybridImageProcessorPil",
            {"size": _SQUARE, "high_res_size": {"height": 96, "width": 96}},
        ),
        vision=_siglip(),
        text={"model_type": "llama"},
        config={
            "high_res_vision_config": {
                "model_type": "sam_vision_model",
                **_tower(8, 96),
                "output_channels": 8,
                "window_size": 4,
                "global_attn_indexes": [0, 1],
                "num_pos_feats": 16,
            }
        },
        named={"image_token": "<image_placeholder>"},
        ids={"image_token_id": "<image_placeholder>"},
        values={"num_image_tokens": 36},
    ),
    "exaone4_5": Recipe(
        name="Exaone4_5_",
        image="<|image_pad|>",
        mark="<|vision_start|><|image_pad|><|vision_end|>",
        images=("qwen2_vl.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil", {"patch_size": 6, "size": _PIXELS}),
        vision={
            "depth": 2,
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_heads": 2,
            "num_key_value_heads": 1,
            "patch_size": 6,
            "window_size": 24,
            "fullatt_block_indexes": [1],
            "out_hidden_size": HIDDEN,
        },
        text={"model_type": "exaone4", "sliding_window": 16, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
        others=_QWEN_MARKS,
        ids=_QWEN_IDS,
    ),
    "hyperclovax_vision_v2": Recipe(
        name="HyperCLOVAXVisionV2",
        image="<|image_pad|>",
        mark="<|vision_start|><|image_pad|><|vision_end|>",
        images=("qwen2_vl.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil", {"patch_size": 6, "size": _PIXELS}),
        vision={
            "model_type": "qwen2_5_vl_vision",
            "depth": 2,
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_heads": 2,
            "patch_size": 6,
            "window_size": 24,
            "fullatt_block_indexes": [1],
            "out_hidden_size": HIDDEN,
        },
        text={"model_type": "hyperclovax", "logits_scaling": 0.5},
        tokenizer="GPT2Tokenizer",
        others=_QWEN_MARKS,
        ids=_QWEN_IDS,
    ),
    "kimi_k25": Recipe(
        name="Kimi_K25",
        image="<|media_pad|>",
        mark="<|media_begin|>image<|media_content|><|media_pad|><|media_end|>",
        images=(
            "kimi_k25.image_processing_kimi_k25",
            "Kimi_K25ImageProcessor",
            {"patch_size": 6, "size": {"max_height": 96, "max_width": 96}},
        ),
        vision={
            "patch_size": 6,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
        },
        text={
            "model_type": "deepseek_v3",
            "num_key_value_heads": HEADS,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "moe_intermediate_size": HIDDEN,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        config={"projection_hidden_size": HIDDEN},
        others=("<|media_begin|>", "<|media_content|>", "<|media_end|>", "<|kimi_k25_video_placeholder|>"),
        ids={"image_token_id": "<|media_pad|>", "video_token_id": "<|kimi_k25_video_placeholder|>"},
    ),
    "lfm2_vl": Recipe(
        name="Lfm2Vl",
        image="<image>",
        images=(
            "lfm2_vl.image_processing_lfm2_vl",
            "Lfm2VlImageProcessor",
            {
                "encoder_patch_size": 8,
                "tile_size": 48,
                "min_image_tokens": 4,
                "max_image_tokens": 9,
                "max_num_patches": 36,
                "size": _SQUARE,
            },
        ),
        vision={"model_type": "siglip2_vision_model", **_tower(), "num_patches": 36, "vision_use_head": False},
        text={"model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
        config={"projector_hidden_size": HIDDEN},
        others=(
            *("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"),
            *(f"<|img_row_{row}_col_{column}|>" for row in range(1, 7) for column in range(1, 7)),
        ),
        ids={"image_token_id": "<image>"},
    ),
    "lfm3_vl": Recipe(
        name="Lfm3Vl",
        image="<|image_pad|>",
        mark="<|vision_start|><|image_pad|><|vision_end|>",
        images=("qwen2_vl.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil", {"patch_size": 6, "size": _PIXELS}),
        vision={
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "patch_size": 6,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "layer_types": ["conv", "full_attention"],
        },
        text={"model_type": "lfm3", "layer_types": ["conv", "full_attention", "conv"]},
        config={"projector_hidden_size": HIDDEN},
        others=_QWEN_MARKS,
        ids={**_QWEN_IDS, "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"},
    ),
    "lighton_ocr": Recipe(
        name="LightOnOcr",
        image="<|image_pad|>",
        images=(
            "pixtral.image_processing_pil_pixtral",
            "PixtralImageProcessorPil",
            {"patch_size": {"height": 12, "width": 12}, "size": {"longest_edge": 96}},
        ),
        vision={"model_type": "pixtral", **_tower(6, 96)},
        text={"model_type": "qwen3"},
        others=("<|vision_pad|>", "<|vision_end|>"),
        named={"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"},
        ids={"image_token_id": "<|image_pad|>"},
        values={"patch_size": 6, "spatial_merge_size": 2},
    ),
    "llama4": Recipe(
        name="Llama4",
        image="<|patch|>",
        mark="<|image|>",
        images=("llama4.image_processing_llama4", "Llama4ImageProcessor", {"size": _SQUARE, "max_patches": 4}),
        vision={
            **_tower(),
            "vision_output_dim": HIDDEN,
            "projector_input_dim": HIDDEN,
            "projector_output_dim": HIDDEN,
            "intermediate_size": 4 * HIDDEN,
        },
        text={
            "intermediate_size_mlp": 2 * HIDDEN,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 16,
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
            "no_rope_layers": [1, 0, 1],
        },
        others=("<|image|>", "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>"),
        ids={"image_token_index": "<|patch|>", "boi_token_index": "<|image_start|>", "eoi_token_index": "<|image_end|>"},
        values={"patch_size": 8},
    ),
    "llava_next_video": Recipe(
        name="LlavaNextVideo",
        image="<image>",
        images=_LLAVA_NEXT,
        vision=_CLIP_TOWER,
        text={"model_type": "llama"},
        config={"image_grid_pinpoints": _PINPOINTS, "image_seq_length": 16},
        others=("<video>",),
        ids={"image_token_index": "<image>", "video_token_index": "<video>"},
        values=_LLAVA_VALUES,
    ),
    "muse_glimmer": Recipe(
        name="MuseGlimmer",
        image="<|patch|>",
        images=(
            "muse_glimmer.image_processing_muse_glimmer",
            "MuseGlimmerImageProcessor",
            {"patch_size": 6, "max_image_tokens": 64},
        ),
        vision={
            "patch_size": 6,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
            "max_position_embeddings": 64,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
        },
        text={
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "layer_rope_theta": [10000.0, 0, 10000.0],
        },
        config={"out_hidden_size": 4 * HIDDEN, "projector_hidden_size": HIDDEN},
        others=("<|image_start|>", "<|image_end|>", "<|video|>", "<|vid_frame_separator|>", "<|vid_start|>", "<|vid_end|>"),
        ids={"image_token_id": "<|patch|>", "video_token_id": "<|video|>"},
    ),
    "ovis2": Recipe(
        name="Ovis2",
        image="<IMG_ATOM>",
        mark="<image>",
        images=(
            "ovis2.image_processing_pil_ovis2",
            "Ovis2ImageProcessorPil",
            {"size": _SQUARE, "crop_to_patches": True, "max_patches": 6},
        ),
        vision={**_tower(), "hidden_stride": 2, "vocab_size": 24, "num_visual_indicator_tokens": 5},
        text={"model_type": "qwen2"},
        config={"hidden_size": HIDDEN},
        others=("<image>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
        ids={
            "image_token_id": "<IMG_ATOM>",
            "visual_indicator_token_ids": ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
        },
        values={"image_seq_length": 9},
    ),
    "paddleocr_vl": Recipe(
        name="PaddleOCRVL",
        image="<|IMAGE_PLACEHOLDER|>",
        mark="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        images=(
            "paddleocr_vl.image_processing_pil_paddleocr_vl",
            "PaddleOCRVLImageProcessorPil",
            {"patch_size": 6, "size": _PIXELS},
        ),
        vision=_tower(6),
        text={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
        others=("<|IMAGE_START|>", "<|IMAGE_END|>", "<|video_pad|>"),
        named={"image_token": "<|IMAGE_PLACEHOLDER|>"},
        ids={
            "image_token_id": "<|IMAGE_PLACEHOLDER|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|IMAGE_START|>",
            "vision_end_token_id": "<|IMAGE_END|>",
        },
    ),
    "qianfan_ocr": Recipe(
        name="QianfanOCR",
        image="<IMG_CONTEXT>",
        mark="<image>",
        images=_TILES,
        vision={**_tower(), "image_size": [48, 48], "patch_size": [8, 8]},
        text={"model_type": "qwen3"},
        config={"image_seq_length": 9},
        others=("<image>", "<img>", "</img>"),
        named={"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"},
        ids={"image_token_id": "<IMG_CONTEXT>"},
        values={"image_seq_length": 9},
    ),
    "qwen2_5_omni_thinker": Recipe(
        name="Qwen2_5OmniThinker",
        processor="Qwen2_5OmniProcessor",
        vision={
            "depth": 2,
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_heads": 2,
            "patch_size": 6,
            "window_size": 24,
            "fullatt_block_indexes": [1],
            "out_hidden_size": HIDDEN,
        },
        text={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
        config={
            "audio_config": {
                "d_model": HIDDEN,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": HIDDEN,
                "num_mel_bins": 16,
                "output_dim": HIDDEN,
            }
        },
        **_OMNI,
    ),
    "qwen3_omni_moe_thinker": Recipe(
        name="Qwen3OmniMoeThinker",
        processor="Qwen3OmniMoeProcessor",
        vision={
            "depth": 3,
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_heads": 2,
            "patch_size": 6,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        text={
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": HIDDEN,
        },
        config={
            "audio_config": {
                "d_model": HIDDEN,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": HIDDEN,
                "num_mel_bins": 16,
                "output_dim": HIDDEN,
                "downsample_hidden_size": 16,
            }
        },
        **_OMNI,
    ),
    "step3p7": Recipe(
        name="Step3p7",
        image="<im_patch>",
        images=(
            "step3p7.image_processing_step3p7",
            "Step3p7ImageProcessor",
            {"size": _SQUARE, "patch_size": 32, "vision_patch_size": 4, "max_image_size": 128},
        ),
        vision={**_tower(4), "max_position_embeddings": 144},
        text={
            "model_type": "step3p5",
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": HIDDEN,
            "share_expert_dim": HIDDEN,
        },
        others=("<patch_start>", "<patch_end>", "<patch_newline>", "<im_start>", "<im_end>"),
        ids={"image_token_id": "<im_patch>"},
    ),
    "video_llama_3": Recipe(
        name="VideoLlama3",
        image="<|image_pad|>",
        images=(
            "video_llama_3.image_processing_pil_video_llama_3",
            "VideoLlama3ImageProcessorPil",
            {"patch_size": 12, "size": _PIXELS},
        ),
        vision={
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 12,
        },
        text={"model_type": "qwen2"},
        others=("<|video_pad|>",),
        ids=_QWEN_IDS,
    ),
    "video_llava": Recipe(
        name="VideoLlava",
        image="<image>",
        images=(
            "video_llava.image_processing_video_llava",
            "VideoLlavaImageProcessor",
            {"size": {"shortest_edge": 48}, "crop_size": _SQUARE},
        ),
        vision=_CLIP_TOWER,
        text={"model_type": "llama"},
        config={"image_seq_length": 16},
        others=("<video>",),
        ids={"image_token_index": "<image>", "video_token_index": "<video>"},
        values=_LLAVA_VALUES,
    ),
    "vipllava": Recipe(
        name="VipLlava",
        image="<image>",
        images=_CLIP,
        vision=_CLIP_TOWER,
        text={"model_type": "llama"},
        config={"vision_feature_layers": [-2, -1], "image_seq_length": 16},
        ids={"image_token_index": "<image>"},
        processor="LlavaProcessor",
        values=_LLAVA_VALUES,
    ),
}
"""By `model_type`."""


def make_tiny_by_recipe(
    family: str, folder: str | Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = False
) -> Path:
    """Write a random checkpoint of a family of `RECIPES` to `folder` and return it.

    Raises AttributeError where the installed transformers does not have the family, and ImportError where it lacks what its image
    processor needs.
    """
    folder, recipe = Path(folder), RECIPES[family]
    name = recipe.name
    config_class, model_class = (getattr(transformers, f"{name}{kind}") for kind in ("Config", "ForConditionalGeneration"))
    special = (*_BASE, *dict.fromkeys((recipe.image, *recipe.others)))
    if recipe.tokenizer:
        tokenizer = make_byte_tokenizer(recipe.tokenizer, special, eos="<|im_end|>", pad="<|endoftext|>")
    else:
        tokenizer = make_tokenizer(special, bos=None, eos="<|im_end|>", pad="<|endoftext|>", named=recipe.named or None)
    ids = token_ids(tokenizer, *special)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "head_dim": HIDDEN // HEADS,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": tied,
        **recipe.text,
    }
    found: dict[str, Any] = {
        key: ids[tokens] if isinstance(tokens, str) else [ids[token] for token in tokens] for key, tokens in recipe.ids.items()
    }
    config = config_class(vision_config=recipe.vision, text_config=text, tie_word_embeddings=tied, **recipe.config, **found)
    model = random_model(model_class, config, seed)
    save_model(folder, model, dtype, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"])
    module, images, settings = recipe.images
    image_processor = getattr(importlib.import_module(f"transformers.models.{module}"), images)(**settings)
    template = _TEMPLATE.replace("MARK", recipe.mark or recipe.image)
    save_processor(folder, recipe.processor or f"{name}Processor", tokenizer, image_processor, template, **recipe.values)
    return folder


BY_RECIPE: dict[str, Callable[..., Path]] = {name: partial(make_tiny_by_recipe, name) for name in RECIPES}
"""Family -> what writes a tiny checkpoint of it to a folder."""
