"""A model, its processor and an adapter from local folders.

Nothing here reaches the network but for a model that is given by its id on the hub, and is not in the local cache (`models.hub`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel

from mmdpo_trainers.config.sections.quantization import QuantizationConfig
from mmdpo_trainers.errors import StageError
from mmdpo_trainers.models import quantized
from mmdpo_trainers.models.chat_format import render_prompt
from mmdpo_trainers.models.encode import EncodedPrompts, encode_prompts
from mmdpo_trainers.models.families import FAMILIES, family_of, refusal_of
from mmdpo_trainers.models.hub import resolve_model_path
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.processors import load_processor
from mmdpo_trainers.models.template_date import TemplateDate
from mmdpo_trainers.models.whole_weights import whole_weights, without_bars

__all__ = [
    "FAMILIES",
    "EncodedPrompts",
    "LoadedModel",
    "encode_prompts",
    "load_model",
    "render_prompt",
    "resolve_device",
    "resolve_dtype",
    "resolve_model_path",
]

logger = logging.getLogger(__name__)

_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


@whole_weights()
def load_model(
    path: str | Path,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
    processor: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    date: TemplateDate | None = None,
    quantization: QuantizationConfig | BitsAndBytesConfig | None = None,
) -> LoadedModel:
    """Load a model, its processor and optionally a PEFT adapter.

    path: a Hugging Face folder of a family in `FAMILIES` or one that follows the conventions (`Conventional`), a shipped model's name, or
    an id on the hub. revision: of an id, its branch, tag or commit.
    processor: another folder to take the processor from.
    dtype: `auto` (the checkpoint's own), a name such as `bfloat16`, or a torch dtype. device: `auto` is CUDA where there is one.
    date: what a chat template that prints the date is told; None: this moment.
    quantization: the language tower in 4 bits, as it says; a checkpoint that is in 4 bits already is loaded as it is.
    The adapter is merged into the weights; beside 4-bit ones, which merging would round anew, its layers stay.
    No process has a part of the weights only, also where it trains with ZeRO-3.

    Raises StageError naming what is missing: the folder, config.json, weights, a processor file, or support for the family.
    """
    target = resolve_device(device)
    folder, config = open_folder(path, revision)
    in_4_bits = quantized.check_loadable(folder, config, quantization)
    its_processor = load_processor(folder if processor is None else resolve_model_path(processor), config.model_type)
    asked = quantization if quantization is not None and quantization.load_in_4bit else None
    torch_dtype = dtype if isinstance(dtype, torch.dtype) else resolve_dtype(dtype)
    if in_4_bits and torch.float64 in (torch_dtype, getattr(config, "dtype", None) if torch_dtype == "auto" else None):
        raise StageError(
            f"model {folder}: dtype: 4-bit weights compute in float32, bfloat16 or float16, got float64; set one of them"
        )
    model, loading = _read(folder, torch_dtype, asked, target if in_4_bits else None)
    missing = sorted(loading["missing_keys"])
    if missing:
        # from_pretrained would fill these at random and only warn.
        raise StageError(f"model {folder}: {len(missing)} weights are missing, such as {missing[0]}; download it again")
    if in_4_bits:
        _settle(model, folder, asked)
    if adapter is not None:
        model = _with_adapter(model, Path(adapter), merged=not in_4_bits)
    model.to(target).eval()
    if model.dtype == torch.float64:
        # PyTorch's grouped products, which experts go through else, have no float64.
        model.set_experts_implementation("eager")
    _check_processor(model, its_processor, folder)
    unchecked = getattr(family_of(model), "unchecked", None)
    if unchecked is not None:
        logger.warning("model %s: %s", folder, unchecked)
    return LoadedModel(
        model=model,
        processor=its_processor,
        path=folder,
        adapter=None if adapter is None else Path(adapter),
        date=date or TemplateDate.now(),
    )


def _read(folder: Path, dtype: Any, quantization: Any, device: torch.device | None) -> Any:
    """The model, and what `from_pretrained` says of missing weights. device: where 4-bit weights are made; None: they are whole."""
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "output_loading_info": True}
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model_class = family_of(config).model_class
        if device is not None:
            options["device_map"] = {"": device}
            # It warns that a product is missing which `quantized.settle` switches off.
            logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        if quantization is not None:
            options["quantization_config"] = quantized.settings_of(model_class, config, quantization)
        with without_bars():
            return model_class.from_pretrained(folder, **options)
    except ImportError as error:
        raise StageError(f"model {folder}: a package that its family needs is missing: {error}") from error
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StageError(f"model {folder}: its weights cannot be loaded ({error}); download the checkpoint again") from error


def _settle(model: Any, folder: Path, quantization: Any) -> None:
    """See `quantized.settle`. StageError for a quantised model that cannot be used."""
    if not quantized.quantized_layers(model):
        raise StageError(f"model {folder}: its language tower has no linear layer to quantise; leave quantization out")
    if quantized.is_quantized(model.get_output_embeddings().weight):
        raise StageError(
            f"model {folder}: output head: expected whole weights, of which log-probabilities are made, got 4-bit ones; quantise the model "
            "with its head among llm_int8_skip_modules"
        )
    own = isinstance(quantization, QuantizationConfig) and quantization.bnb_4bit_compute_dtype == "auto"
    quantized.settle(model, "auto" if own else None)


def open_folder(path: str | Path, revision: str | None = None, *, weights: bool = True) -> tuple[Path, Any]:
    """What a `--model` value means: its folder (`resolve_model_path`) and its configuration (`check_folder`)."""
    folder = resolve_model_path(path, revision, weights=weights)
    return folder, check_folder(folder, weights=weights)


def check_folder(folder: Path, *, weights: bool = True) -> Any:
    """The configuration of a model folder. StageError where it says, without a weight read, that the model cannot be used.

    weights: False where there need be none, as nothing is loaded.
    """
    _model_type(folder)
    if weights and not any(any(folder.glob(pattern)) for pattern in _WEIGHT_FILES):
        raise StageError(f"model {folder}: no weights ({' or '.join(_WEIGHT_FILES)}); download the whole checkpoint")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StageError(f"model {folder}: config.json cannot be used ({error}); download the checkpoint again") from error
    text = config.get_text_config()
    quantized.check_loadable(folder, config, None)
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        cap = getattr(text, name, None)
        if cap is not None and not (isinstance(cap, int | float) and 0 < cap < float("inf")):
            raise StageError(f"model {folder}: config.json: {name}: expected a number above 0, or null for none, got {cap!r}")
    return config


def _model_type(folder: Path) -> str:
    config = folder / "config.json"
    if not config.is_file():
        adapter = " (it is a PEFT adapter: pass its base model, and the folder as the adapter)" if _is_adapter(folder) else ""
        raise StageError(f"model {folder}: no config.json{adapter}; give the folder of a whole Hugging Face checkpoint")
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        model_type = values.get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise StageError(f"model {folder}: config.json cannot be read ({error})") from error
    refusal = refusal_of(values)
    if refusal is not None:
        raise StageError(f"model {folder}: {refusal}; families with a declaration: {', '.join(FAMILIES)}")
    if model_type not in FAMILIES:
        try:
            family_of(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
        except (OSError, ValueError) as error:
            raise StageError(f"model {folder}: {error}; families with a declaration: {', '.join(FAMILIES)}") from error
    for key in ("image_token_index", "image_token_id"):
        if key in values and not isinstance(values[key], int):
            raise StageError(
                f"model {folder}: config.json: {key} must be the id of the image token, got {values[key]!r}; set it to the id "
                "that the tokenizer gives <image>"
            )
    return str(model_type)


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


@torch.no_grad()
def _check_processor(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """StageError where a picture does not come out of the processor as the model takes it in."""
    mismatch = f"model {folder}: processor and model do not belong together"
    remedy = "use the processor that the checkpoint came with"
    family = family_of(model)
    token, found, expected = family.image_token(processor), family.image_token_id(processor), model.config.image_token_id
    if found != expected and not type(family).is_declared:
        raise StageError(
            f"model {folder}: family {family.name!r} has no declaration, and its processor's token for a picture, {token}, is not the one of "
            f"a feature in the model, whose id is {expected}: that needs a declaration"
        )
    if found != expected:
        raise StageError(f"{mismatch}: id of {token}: the processor gives {found}, the model takes {expected}; {remedy}")
    parameter, inputs = next(model.parameters()), {}
    try:
        pictures = family.encode_images(processor, [Image.new("RGB", (64, 64), (200, 40, 40))], [True])
        for name, value in pictures.inputs.items():
            inputs[name] = value.to(parameter.device, parameter.dtype if value.is_floating_point() else value.dtype)
        family.features(model.base_model, dataclasses.replace(pictures, inputs=inputs))
    except (ValueError, RuntimeError, IndexError, TypeError, KeyError, AttributeError) as error:
        shapes = "".join(f", {name} {tuple(value.shape)}," for name, value in inputs.items() if name == "pixel_values")
        raise StageError(
            f"{mismatch}: a picture of 64 x 64 pixels{shapes} does not go through both: {error}; {remedy}"
        ) from error


def _with_adapter(model: PreTrainedModel, adapter: Path, *, merged: bool) -> Any:
    from peft import PeftModel

    if not _is_adapter(adapter):
        raise StageError(f"adapter {adapter}: no adapter_config.json there; give the folder that PEFT's save_pretrained wrote")
    try:
        found = PeftModel.from_pretrained(model, str(adapter), is_trainable=False, local_files_only=True)
        return found.merge_and_unload() if merged else found.get_base_model()
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise StageError(f"adapter {adapter} does not fit the model ({error}); it was trained on another base") from error


def resolve_dtype(name: str) -> torch.dtype | str:
    """The number type a name means; `auto` stays. Raises StageError for anything else."""
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
