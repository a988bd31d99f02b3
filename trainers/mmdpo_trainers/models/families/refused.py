"""Families that are refused by name, and why; and model code that is not transformers' own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_CHOOSES = "its layers choose which keys a token sees (an indexer), for which there are no trees and no attention to record"
_DOCUMENTS = "it reads documents in a format of its own and answers no questions about several pictures; it was not checked"
_UNCHECKED = "it was not checked with weights"
_WHOLE_OMNI = (
    "of the whole model only the thinker is trained: load its class in transformers ({name}) from the folder, save that and the processor "
    "to another folder, and give this one"
)

REFUSED: dict[str, str] = {
    "apertus1p5": "a picture becomes tokens of the vocabulary, which are no features to share, and there is an audio tokenizer; not checked",
    "deepseek_ocr2": _DOCUMENTS,
    "dots3_note": _CHOOSES,
    "ernie4_5_vl_moe": (
        "experts for pictures and for text are told apart by token types of its own (moe_mm_token_type_ids), which nobody makes for a tree"
    ),
    "fast_vlm": "its vision tower is timm's, on which it was not checked; LLaVA on the same language model (Qwen2) is used",
    "florence2": _UNCHECKED,
    "glm5_next": _CHOOSES,
    "got_ocr2": _DOCUMENTS,
    "granite4_vision": "its features go into several layers (deep stack) by a table of its own (deepstack_layer_map)",
    "granite_docling": _DOCUMENTS,
    "hunyuan_vl": "a picture's position counts the pictures of the whole batch, so a record's numbers hang on its neighbours",
    "idefics2": (
        "its processor joins the marks of pictures that stand side by side, so a picture's tokens hang on its neighbours; Idefics3 is used"
    ),
    "inkling2": _UNCHECKED,
    "inkling2_loop": _UNCHECKED,
    "janus": _UNCHECKED,
    "llama4": (
        "transformers' class for its pictures fails at its first forward (as of 5.24 it asks its language model's output for image_outputs), "
        "so there is nothing to hold it to"
    ),
    "mistral_large4": _CHOOSES,
    "molmo2": "all pictures of a prompt are one block whose tokens see each other both ways, which is no interval of rows for two or more",
    "muse_spark": "pictures, video and sound go through towers that were not checked; Muse Glimmer is its nearest",
    "perception_lm": "its vision tower is timm's, on which it was not checked",
    "pp_chart2table": _DOCUMENTS,
    "qwen2_5_omni": _WHOLE_OMNI.format(name="Qwen2_5OmniThinkerForConditionalGeneration"),
    "qwen3_omni_moe": _WHOLE_OMNI.format(name="Qwen3OmniMoeThinkerForConditionalGeneration"),
    "qwen4_exp": (
        "a layer reads n-grams of the tokens before it and a convolution over them, residual streams are mixed and attention chooses its keys: "
        "no tree of these is made"
    ),
    "unlimited_ocr": _DOCUMENTS,
}
"""`model_type` -> what is missing. Families that the conventions refuse need no line here."""

_NEEDS = {"qwen2_5_omni_thinker": "Qwen2_5OmniThinkerModel", "qwen3_omni_moe_thinker": "Qwen3OmniMoeThinkerModel"}
"""`model_type` -> a class that older transformers lack; their processors ask for video, too."""

_NEAREST = {"internlm": "internvl", "internvl_chat": "internvl"}
"""What the `model_type` of remote code begins with -> the nearest family that is used here."""


def refusal_of(values: Mapping[str, Any]) -> str | None:
    """Why the model of a config.json with these values is refused by its name alone, or None where it is not."""
    kind = str(values.get("model_type"))
    if kind in REFUSED:
        return f"family {kind!r} is refused: {REFUSED[kind]}"
    if kind in _NEEDS and not hasattr(transformers, _NEEDS[kind]):
        return f"family {kind!r} needs a transformers that has {_NEEDS[kind]}, got {transformers.__version__}; update it"
    if kind in CONFIG_MAPPING:
        return None
    code = "; its code is on a hub (auto_map in config.json), which is not run" if values.get("auto_map") else ""
    nearest = next((family for begins, family in _NEAREST.items() if kind.startswith(begins)), None)
    instead = (
        f"; the nearest family that is used is {nearest!r}: give a checkpoint of it in transformers' format" if nearest else ""
    )
    return f"transformers {transformers.__version__} has no model_type {kind!r}{code}{instead}"
