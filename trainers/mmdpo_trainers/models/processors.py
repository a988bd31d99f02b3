"""A model folder's processor: tokenizer, chat template and image processor."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transformers
from transformers import AutoProcessor, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from mmdpo_trainers.errors import StageError
from mmdpo_trainers.models.families.pixtral import pixtral_processor

__all__ = ["load_processor"]

_NAMING_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def __getattr__(name: str) -> Any:
    """A processor class of transformers for text and pictures alone: its own asks for a video processor too, and that for torchvision.

    A name of this module, so that a processor can be pickled for a data loader's process.
    """
    base = getattr(transformers, name, None) if name.endswith("Processor") else None
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = _without_video(base)
    return found


def _without_video(base: Any) -> Any:
    """The class without a video processor, wherever among its parts that stands."""
    every = base.get_attributes()
    place = every.index("video_processor")

    class WithoutVideo(ProcessorMixin):
        """Between the class and transformers' own, which takes no part that is not among the class's."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("video_processor", None)
            super().__init__(*args[:place], *args[place + 1 :], **kwargs)

    def get_attributes(cls: Any) -> list[str]:
        return [name for name in every if name != "video_processor"]

    def arguments(cls: Any, *args: Any, **kwargs: Any) -> list[Any]:
        # Its own __init__ takes all parts by their places.
        parts = super(found, cls)._get_arguments_from_pretrained(*args, **kwargs)
        return [*parts[:place], None, *parts[place:]]

    found: Any = type(base.__name__, (base, WithoutVideo), {"__module__": __name__})
    if place < every.index("tokenizer"):
        # It asks the part, when it is made, how it would cut a film.
        found.video_processor = SimpleNamespace(slice_mode=False, downsample_mode="16x")
    found.get_attributes = classmethod(get_attributes)
    found._get_arguments_from_pretrained = classmethod(arguments)
    return found


def _processor_class(folder: Path, model_type: str) -> Any:
    """The class to load a folder's processor by: `AutoProcessor`, unless what it finds would ask for a video processor."""
    named = [json.loads((folder / file).read_text(encoding="utf-8")) for file in _NAMING_FILES if (folder / file).is_file()]
    names = [values["processor_class"] for values in named if isinstance(values, dict) and values.get("processor_class")]
    name = names[0] if names else PROCESSOR_MAPPING_NAMES.get(model_type)
    own = pixtral_processor(name)
    if own is not None:
        return own
    base = getattr(transformers, str(name), None)
    if base is None or "video_processor" not in inspect.signature(base.__init__).parameters:
        return AutoProcessor
    return getattr(sys.modules[__name__], str(name))


def _uncover_pillow(model_type: str) -> None:
    """Put a family's Pillow image processor where `AutoImageProcessor` looks: transformers before 5.23 hides some without torchvision."""
    package = f"transformers.models.{model_type}"
    name = f"{package}.image_processing_pil_{model_type}"
    if is_torchvision_available() or importlib.util.find_spec(package) is None or importlib.util.find_spec(name) is None:
        return
    for found in vars(importlib.import_module(name)).values():
        its_name = getattr(found, "__name__", "")
        for module in (transformers, sys.modules[package]) if its_name.endswith("ImageProcessorPil") else ():
            if getattr(getattr(module, its_name, None), "is_dummy", False):
                setattr(module, its_name, found)


def load_processor(folder: Path, model_type: str) -> Any:
    """The processor of a local folder, complete for a model of this `model_type`.

    Raises StageError naming the folder where files are missing or it is no processor for text and pictures.
    """
    try:
        found = _processor_class(folder, model_type)
        _uncover_pillow(model_type)
        given = {"video_processor": None} if "video_processor" in inspect.signature(found.__init__).parameters else {}
        # Code that a folder brings along is not run, and nobody is asked whether to.
        processor = found.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **given)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise StageError(
            f"model {folder}: its processor cannot be loaded ({error}); the folder needs tokenizer.json and "
            "processor_config.json or preprocessor_config.json"
        ) from error
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise StageError(f"model {folder}: expected a processor for text and pictures, got {type(processor).__name__}")
    if hasattr(processor, "num_additional_image_tokens") and processor.patch_size is None:
        _complete(processor, folder)
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    if processor.tokenizer.pad_token is None:
        raise StageError(
            f"model {folder}: its tokenizer has neither a padding nor an end token; the folder needs a tokenizer_config.json that "
            "names them (pad_token, eos_token)"
        )
    return processor


def _complete(processor: Any, folder: Path) -> None:
    """Checkpoints of the first LLaVAs keep the number of image tokens out of the processor's own file; take it from the model's."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    processor.patch_size = config["vision_config"]["patch_size"]
    processor.vision_feature_select_strategy = config.get("vision_feature_select_strategy", "default")
    processor.num_additional_image_tokens = 1
