"""A model folder's processor: tokenizer, chat template and image processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoProcessor

from mmdpo_trainers.errors import StageError

__all__ = ["Qwen2_5_VLProcessor", "load_processor"]


class Qwen2_5_VLProcessor(transformers.Qwen2_5_VLProcessor):  # noqa: N801 - the name that a saved folder carries
    """Qwen2.5-VL's processor for text and pictures. transformers' own asks for a video processor too, and that for torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **kwargs: Any) -> None:
        # The sub-processors are those this signature names.
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)


_CLASSES: dict[str, Any] = {"qwen2_5_vl": Qwen2_5_VLProcessor}
"""`model_type` -> processor class, where it is not the one transformers finds."""


def load_processor(folder: Path, model_type: str) -> Any:
    """The processor of a local folder, complete for a model of this `model_type`.

    Raises StageError naming the folder where files are missing or it is no processor for text and pictures.
    """
    try:
        processor = _CLASSES.get(model_type, AutoProcessor).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise StageError(
            f"model {folder}: its processor cannot be loaded ({error}); the folder needs tokenizer.json and "
            "processor_config.json or preprocessor_config.json"
        ) from error
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise StageError(f"model {folder}: expected a processor for text and pictures, got {type(processor).__name__}")
    if model_type == "llava" and getattr(processor, "patch_size", None) is None:
        _complete_llava(processor, folder)
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    if processor.tokenizer.pad_token is None:
        raise StageError(
            f"model {folder}: its tokenizer has neither a padding nor an end token; the folder needs a tokenizer_config.json that "
            "names them (pad_token, eos_token)"
        )
    return processor


def _complete_llava(processor: Any, folder: Path) -> None:
    """Older LLaVA checkpoints keep the number of image tokens out of the processor's own file; take it from the model's."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    processor.patch_size = config["vision_config"]["patch_size"]
    processor.vision_feature_select_strategy = config.get("vision_feature_select_strategy", "default")
    processor.num_additional_image_tokens = 1
