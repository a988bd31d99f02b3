"""A model, its processor and an adapter from local folders.

Nothing here reaches the network: every path is a folder of this machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedModel
from transformers.utils import logging as transformers_logging

from mmdpo_trainers.errors import StageError
from mmdpo_trainers.prompts import EncodedPrompts, encode_prompts, render_prompt

__all__ = [
    "FAMILIES",
    "EncodedPrompts",
    "LoadedModel",
    "encode_prompts",
    "load_model",
    "render_prompt",
    "resolve_device",
    "resolve_model_path",
]

SHAPES = "shapes"
"""The name that stands for the shipped checkpoint."""

FAMILIES: dict[str, type[PreTrainedModel]] = {"llava": LlavaForConditionalGeneration}
"""`model_type` of config.json -> model class."""

_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its processor, and what the stages ask about its family."""

    model: Any
    processor: Any
    path: Path
    adapter: Path | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def image_token_id(self) -> int:
        return int(self.model.config.image_token_id)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the language model."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches, which are the image tokens, of one picture."""
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        return side, side

    @property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end a response."""
        end = self.model.generation_config.eos_token_id
        if end is None:
            end = self.tokenizer.eos_token_id
        return frozenset(() if end is None else [end] if isinstance(end, int) else end)

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else min(self.end_ids, default=0)


def resolve_model_path(path: str | Path) -> Path:
    """The folder a `--model` value means: the shipped base for `shapes`, otherwise the local folder itself.

    Raises StageError where there is no such folder.
    """
    if str(path) == SHAPES:
        folder = Path(__file__).parent / "shapes" / "base"
        if not folder.is_dir():
            raise StageError(f"the shipped base model is not installed ({folder} is missing); give --model a folder")
        return folder
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise StageError(
            f"model {str(path)!r}: no such folder. Models are read from local folders only: download it first "
            f"(`hf download {path} --local-dir FOLDER`) and pass --model FOLDER, or pass --model {SHAPES}"
        )
    return folder


def load_model(
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    processor: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
) -> LoadedModel:
    """Load a model, its processor and optionally a PEFT adapter (merged into the weights) from local folders.

    path: a Hugging Face folder of a family in `FAMILIES`, or `shapes`. processor: another folder to take the processor from.
    dtype: `auto` (the checkpoint's own), a name such as `bfloat16`, or a torch dtype. device: `auto` is CUDA where there is one.

    Raises StageError naming what is missing: the folder, config.json, weights, a processor file, or support for the family.
    """
    target = resolve_device(device)
    folder = resolve_model_path(path)
    model_class = _family(folder)
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHT_FILES):
        raise StageError(f"model {folder}: no weights ({' or '.join(_WEIGHT_FILES)}); download the whole checkpoint")
    torch_dtype = dtype if isinstance(dtype, torch.dtype) else _dtype(dtype)
    its_processor = _load_processor(folder if processor is None else resolve_model_path(processor))
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = model_class.from_pretrained(folder, dtype=torch_dtype, local_files_only=True, output_loading_info=True)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise StageError(f"model {folder}: its weights cannot be loaded ({error}); download the checkpoint again") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    model, loading = loaded
    missing = sorted(loading["missing_keys"])
    if missing:
        # from_pretrained would fill these at random and only warn.
        raise StageError(f"model {folder}: {len(missing)} weights are missing, such as {missing[0]}; download it again")
    if adapter is not None:
        model = _merge_adapter(model, Path(adapter))
    model.to(target).eval()
    return LoadedModel(model=model, processor=its_processor, path=folder, adapter=None if adapter is None else Path(adapter))


def _family(folder: Path) -> type[PreTrainedModel]:
    config = folder / "config.json"
    if not config.is_file():
        adapter = " (it is a PEFT adapter: pass its base model, and the folder as the adapter)" if _is_adapter(folder) else ""
        raise StageError(f"model {folder}: no config.json{adapter}; give the folder of a whole Hugging Face checkpoint")
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        model_type = values.get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise StageError(f"model {folder}: config.json cannot be read ({error})") from error
    if model_type not in FAMILIES:
        raise StageError(
            f"model {folder}: family {model_type!r} is not supported; supported: {', '.join(FAMILIES)}. A family needs a patched "
            "attention, a known image token and a known patch grid"
        )
    for key in ("image_token_index", "image_token_id"):
        if key in values and not isinstance(values[key], int):
            raise StageError(
                f"model {folder}: config.json: {key} must be the id of the image token, got {values[key]!r}; set it to the id "
                "that the tokenizer gives <image>"
            )
    return FAMILIES[model_type]


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _load_processor(folder: Path) -> Any:
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise StageError(
            f"model {folder}: its processor cannot be loaded ({error}); the folder needs tokenizer.json and "
            "processor_config.json or preprocessor_config.json"
        ) from error
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise StageError(f"model {folder}: expected a processor for text and pictures, got {type(processor).__name__}")
    _complete_processor(processor, folder)
    return processor


def _complete_processor(processor: Any, folder: Path) -> None:
    """Older LLaVA checkpoints keep the number of image tokens out of the processor's own file; take it from the model's."""
    if getattr(processor, "patch_size", None) is None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        processor.patch_size = config["vision_config"]["patch_size"]
        processor.vision_feature_select_strategy = config.get("vision_feature_select_strategy", "default")
        processor.num_additional_image_tokens = 1
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    if processor.tokenizer.pad_token is None:
        raise StageError(
            f"model {folder}: its tokenizer has neither a padding nor an end token; the folder needs a tokenizer_config.json that "
            "names them (pad_token, eos_token)"
        )


def _merge_adapter(model: PreTrainedModel, adapter: Path) -> Any:
    from peft import PeftModel

    if not _is_adapter(adapter):
        raise StageError(f"adapter {adapter}: no adapter_config.json there; give the folder that PEFT's save_pretrained wrote")
    try:
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=False, local_files_only=True).merge_and_unload()
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise StageError(f"adapter {adapter} does not fit the model ({error}); it was trained on another base") from error


def _dtype(name: str) -> torch.dtype | str:
    if name == "auto":
        return "auto"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise StageError(f"dtype {name!r}: expected auto, float32, bfloat16, float16 or float64")
    return dtype


def resolve_device(device: str | torch.device) -> torch.device:
    """The device a name means; `auto` is CUDA where there is one. Raises StageError where this machine has no such device."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise StageError(f"device {str(device)!r}: expected cpu, cuda or cuda:N") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise StageError(f"device {str(device)!r}: PyTorch finds no CUDA device here; choose cpu, or see `mmdpo env`")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise StageError(f"device {str(device)!r}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return found
