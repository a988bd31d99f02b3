"""Models whose language tower is in 4 bits (bitsandbytes): how they are loaded, and what of a quantised model can be used here.

QLoRA (arXiv 2305.14314) keeps the frozen base in 4 bits and trains adapters on it. A product with a quantised weight is
`torch.nn.functional.linear(x, dequantised weight)` in the layer's compute dtype, so all that is exact of whole models is exact here.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from mmdpo_trainers.config.sections.quantization import QuantizationConfig
from mmdpo_trainers.errors import StageError
from mmdpo_trainers.files.atomic import read_json, write_atomic

EXTRA = "pip install 'mmdpo-kernels[qlora]'"
FILE = "quantization.json"
"""File beside an adapter that was trained on a quantised model: transformers' `BitsAndBytesConfig` of the model."""
EIGHT_BITS = (
    "LLM.int8 takes whole columns of a batch out of its rounding, so a sequence's numbers depend on what it is packed with"
)

_FOUR, _EIGHT = "Params4bit", "Int8Params"


def method_of(config: Any) -> str | None:
    """How a configuration says that its weights are quantised: `bitsandbytes_4bit`, `gptq`, `awq`, …; None: they are whole."""
    found = getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None)
    if not found:
        return None
    values = found if isinstance(found, Mapping) else found.to_dict()
    for width in ("4bit", "8bit"):
        if values.get(f"load_in_{width}"):
            return f"bitsandbytes_{width}"
    method = values.get("quant_method")
    return str(getattr(method, "value", method))


def check_loadable(folder: Path, config: Any, quantization: QuantizationConfig | BitsAndBytesConfig | None) -> bool:
    """Whether a model folder is to be loaded in 4 bits. StageError where its weights, or the settings for them, cannot be used."""
    method, asked = method_of(config), quantization is not None and quantization.load_in_4bit
    if isinstance(quantization, BitsAndBytesConfig) and not asked:
        raise StageError(
            f"quantization: expected load_in_4bit, got {quantization.quantization_method() or 'neither 4 nor 8 bits'}: {EIGHT_BITS}"
        )
    if method is not None and method != "bitsandbytes_4bit":
        reason = f": {EIGHT_BITS}" if method == "bitsandbytes_8bit" else ""
        raise StageError(
            f"model {folder}: its weights are quantised (quantization_config in config.json: {method}){reason}; expected float32, bfloat16 or "
            "float16, or bitsandbytes' 4 bits; give the checkpoint that it was made from, with quantization: {load_in_4bit: true} if need be"
        )
    if method is not None and asked:
        raise StageError(
            f"model {folder}: its weights are quantised already (quantization_config in config.json: {method}); leave quantization out, or give "
            "the checkpoint that it was made from"
        )
    if (method is not None or asked) and importlib.util.find_spec("bitsandbytes") is None:
        raise StageError(f"model {folder}: bitsandbytes, which 4-bit weights need, is not installed here; {EXTRA}")
    return method is not None or asked


def settings_of(model_class: Any, config: Any, quantization: QuantizationConfig | BitsAndBytesConfig) -> BitsAndBytesConfig:
    """What `from_pretrained` is told. transformers' own settings stay as they are, and quantise whatever they say.

    transformers keeps a head whole by itself only where nothing else is named, and knows no vision tower: of ours, everything outside the
    decoder stays whole. A vision tower is a small part of the weights, and its features are what pictures are to all layers; the head's
    weight is what log-probabilities are made from, and may be the embedding's too.
    """
    if isinstance(quantization, BitsAndBytesConfig):
        return quantization
    compute = quantization.bnb_4bit_compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
        # Where it is the model's own, that is known once it is loaded.
        bnb_4bit_compute_dtype=None if compute == "auto" else compute,
        llm_int8_skip_modules=[*outside_decoder(model_class, config), *quantization.llm_int8_skip_modules],
    )


def outside_decoder(model_class: Any, config: Any) -> list[str]:
    """Names of the outermost modules that the decoder is not in: head, vision tower, projector, whatever else there is."""
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    decoder, found = model.get_decoder(), []

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if child is decoder:
                continue
            if any(each is decoder for each in child.modules()):
                visit(child, f"{prefix}{name}.")
            else:
                found.append(f"{prefix}{name}")

    visit(model, "")
    return found


def settle(model: nn.Module, compute_dtype: str | None = None) -> None:
    """Make a model with 4-bit weights one that computes the same at all times; nothing where it has none.

    bitsandbytes sets things in a layer's first forward: the compute dtype where there is none, the dtype of the bias, and on CPUs with bfloat16
    products (AVX512_BF16) another layout of the weight, rounded and without a gradient, once it is in evaluation mode. The first two are done
    here, before weights are hashed; the layout is switched off.

    compute_dtype: `auto` sets the model's own; None leaves what it is. Raises ValueError for a weight in that layout, which is another
    weight by then.
    """
    for name, layer in quantized_layers(model).items():
        weight: Any = layer.weight
        if type(weight).__name__ != _FOUR:
            continue
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                f"model: the 4-bit weight of {name} was repacked, and rounded, when the model ran in evaluation mode on "
                "this CPU; load it again, with mmdpo_trainers.models.loading.load_model or without running it before"
            )
        own: Any = layer
        own.support_avx512bf16_for_cpu = False
        if compute_dtype == "auto":
            own.compute_dtype, own.compute_type_is_set = float_dtype(model), True
        if own.bias is not None and own.compute_dtype is not None:
            own.bias.data = own.bias.data.to(own.compute_dtype)
    if compute_dtype == "auto":
        model.config.quantization_config.bnb_4bit_compute_dtype = float_dtype(model)  # type: ignore[union-attr]


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of bitsandbytes with a quantised weight, by name."""
    # PEFT's layers show the weight of the module inside as theirs.
    return {name: module for name, module in model.named_modules() if is_quantized(module._parameters.get("weight"))}


def is_quantized(weight: Any) -> bool:
    """Whether a weight is one of bitsandbytes', of 4 or 8 bits; by its class's name, as the package need not be installed."""
    return type(weight).__name__ in (_FOUR, _EIGHT)


def check_model(argument: str, model: nn.Module) -> bool:
    """Whether a model in memory has 4-bit weights. ValueError, naming the argument, for weights quantised in another way."""
    method = getattr(getattr(model, "quantization_method", None), "value", getattr(model, "quantization_method", None))
    layers = quantized_layers(model)
    eight = next((name for name, layer in layers.items() if type(layer.weight).__name__ == _EIGHT), None)
    if eight is not None:
        raise ValueError(
            f"{argument}: expected whole weights, or bitsandbytes' 4 bits, got 8 bits at {eight}: {EIGHT_BITS}; load it in 4 bits"
        )
    if method not in (None, "bitsandbytes"):
        raise ValueError(
            f"{argument}: expected whole weights, or bitsandbytes' 4 bits, got weights quantised by {method}; load the "
            "checkpoint that it was made from"
        )
    return bool(layers)


def float_dtype(model: nn.Module) -> torch.dtype:
    """The number type of a model's whole weights: 4-bit ones are stored as bytes."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point() and not is_quantized(p))


def save_settings(config: Any, folder: str | Path) -> None:
    """Write how an adapter's base is quantised beside the adapter; nothing where it is whole."""
    found = getattr(config, "quantization_config", None)
    if found:
        write_atomic(Path(folder) / FILE, found if isinstance(found, dict) else found.to_dict())


def read_settings(folder: str | Path) -> BitsAndBytesConfig | None:
    """How the base of an adapter was quantised when it was trained; None: it was whole."""
    path = Path(folder) / FILE
    return BitsAndBytesConfig.from_dict(read_json(path)) if path.is_file() else None
