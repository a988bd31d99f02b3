"""Recipes of families whose pictures become squares, one or several."""

from __future__ import annotations

from typing import Any

from .recipe import HIDDEN, Recipe, tower

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
_CLIP_TOWER = {"model_type": "clip_vision_model", **tower(12), "projection_dim": HIDDEN}
_LLAVA_VALUES = {"patch_size": 12, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
_COHERE = {"model_type": "cohere2", "sliding_window": 16, "logit_scale": 0.25}


def _siglip(**other: Any) -> dict[str, Any]:
    return {"model_type": "siglip_vision_model", **tower(), "vision_use_head": False, **other}


SQUARES: dict[str, Recipe] = {
    "aria": Recipe(
        name="Aria",
        image="<|img|>",
        # The processor asks for pictures of 980 pixels a side.
        images=("aria.image_processing_pil_aria", "AriaImageProcessorPil", {"max_image_size": 980}),
        vision={"model_type": "idefics3_vision", **tower(140, 980)},
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
                **tower(8, 96),
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
        vision={"model_type": "siglip2_vision_model", **tower(), "num_patches": 36, "vision_use_head": False},
        # The last one is in published folders, and vLLM reads it.
        text={
            "model_type": "lfm2",
            "layer_types": ["conv", "full_attention", "conv"],
            "block_auto_adjust_ff_dim": False,
            "conv_dim": HIDDEN,
        },
        config={"projector_hidden_size": HIDDEN},
        others=(
            *("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"),
            *(f"<|img_row_{row}_col_{column}|>" for row in range(1, 7) for column in range(1, 7)),
        ),
        ids={"image_token_id": "<image>"},
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
    "ovis2": Recipe(
        name="Ovis2",
        image="<IMG_ATOM>",
        mark="<image>",
        images=(
            "ovis2.image_processing_pil_ovis2",
            "Ovis2ImageProcessorPil",
            {"size": _SQUARE, "crop_to_patches": True, "max_patches": 6},
        ),
        vision={**tower(), "hidden_stride": 2, "vocab_size": 24, "num_visual_indicator_tokens": 5},
        text={"model_type": "qwen2"},
        config={"hidden_size": HIDDEN},
        others=("<image>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
        ids={
            "image_token_id": "<IMG_ATOM>",
            "visual_indicator_token_ids": ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
        },
        values={"image_seq_length": 9},
    ),
    "qianfan_ocr": Recipe(
        name="QianfanOCR",
        image="<IMG_CONTEXT>",
        mark="<image>",
        images=_TILES,
        vision={**tower(), "image_size": [48, 48], "patch_size": [8, 8]},
        text={"model_type": "qwen3"},
        config={"image_seq_length": 9},
        others=("<image>", "<img>", "</img>"),
        named={"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"},
        ids={"image_token_id": "<IMG_CONTEXT>"},
        values={"image_seq_length": 9},
    ),
    "step3p7": Recipe(
        name="Step3p7",
        image="<im_patch>",
        images=(
            "step3p7.image_processing_step3p7",
            "Step3p7ImageProcessor",
            {"size": _SQUARE, "patch_size": 32, "vision_patch_size": 4, "max_image_size": 128},
        ),
        vision={**tower(4), "max_position_embeddings": 144},
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
