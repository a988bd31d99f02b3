"""DeepSeek-VL: pictures of one size, each the same number of image tokens."""

from __future__ import annotations

from mmdpo_trainers.models.families.family import Family


class DeepseekVL(Family):
    name = "deepseek_vl"
    model_name = "DeepseekVLForConditionalGeneration"
    processor_name = "DeepseekVLProcessor"
    vision = ("vision_model",)
    projector: tuple[str, ...] = ("aligner",)


class DeepseekVLHybrid(DeepseekVL):
    """A second tower for the same picture in higher resolution."""

    name = "deepseek_vl_hybrid"
    model_name = "DeepseekVLHybridForConditionalGeneration"
    processor_name = "DeepseekVLHybridProcessor"
    vision = ("vision_model", "high_res_vision_model")
    projector = ("aligner", "high_res_vision_neck", "high_res_vision_proj", "high_res_vision_alpha")
