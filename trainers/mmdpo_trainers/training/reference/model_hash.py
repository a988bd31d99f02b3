"""What cached log-probabilities are of: a hash of the reference's weights, and all else that changes its numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import xxhash
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from mmdpo_trainers.models.quantized import float_dtype
from mmdpo_trainers.training import model_parts

_BLOCK = 64 * 2**20
_VOLATILE = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"})


def reference_header(model: nn.Module, *, processor: Any = None, autocast: str | bool = False) -> dict[str, Any]:
    """What cached log-probabilities depend on beside the records: a `ReferenceCache`'s header.

    model: the reference; a PEFT model stands for its base. processor: how pictures are scaled and normalised. autocast: the
    number type of its forward passes, where that is not the weights'.
    """
    base = model_parts.base_of(model)
    header = {
        "weights": model_fingerprint(model),
        "dtype": str(float_dtype(base)).removeprefix("torch."),
        "config": _digest(_lasting(base.config.to_diff_dict())) if hasattr(base, "config") else None,
        "autocast": autocast,
    }
    if processor is not None:
        header["pictures"] = _digest(processor.image_processor.to_dict())
    return header


def model_fingerprint(model: nn.Module) -> str:
    """Hash (xxh3, 128 bits) of a model's weights and persistent buffers: names, dtypes, shapes and bytes; adapters left out.

    The same whether or not the model is in PEFT or patched, and on whatever device it is. About as fast as memory is read.
    """
    weights = _weights(model_parts.base_of(model))
    with ThreadPoolExecutor(min(4, torch.get_num_threads())) as pool:
        # Tied weights have several names and one content.
        contents = {(t.data_ptr(), t.dtype, t.shape, t.stride(), t.device): t for t in weights.values()}
        digests = dict(zip(contents, pool.map(_content, contents.values()), strict=True))
    whole = xxhash.xxh3_128()
    for name, t in sorted(weights.items()):
        content = digests[t.data_ptr(), t.dtype, t.shape, t.stride(), t.device]
        whole.update(f"{name} {t.dtype} {tuple(t.shape)} {content}\n".encode())
    return whole.hexdigest()


def _weights(base: nn.Module) -> dict[str, Tensor]:
    """The state dict under the names it had before PEFT put its layers in, without what they added."""
    inner: dict[str, str] = {}
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            inner[f"{name}."] = f"{name}.base_layer."
        elif isinstance(module, TrainableTokensWrapper):
            # Its own name for the wrapped module is not in the state dict.
            inner[f"{name}."] = f"{name}.token_adapter."
        elif isinstance(module, AuxiliaryTrainingWrapper):
            inner[f"{name}."] = f"{name}.original_module."
    # Inner layers first: what is around them opens their names too.
    layers = sorted(inner.items(), key=lambda layer: -len(layer[0]))
    found = {}
    for name, tensor in base.state_dict().items():
        own = _name_without_adapters(name, layers)
        if own is not None and isinstance(tensor, Tensor):
            found[own] = tensor
    return found


def _name_without_adapters(name: str, layers: Sequence[tuple[str, str]]) -> str | None:
    """A state-dict name without the layers PEFT put around modules; None: it belongs to one of these layers."""
    for outer, kept in layers:
        if name.startswith(outer):
            if not name.startswith(kept):
                return None
            name = outer + name.removeprefix(kept)
    return name


def _content(tensor: Tensor) -> str:
    """Hash of a tensor's bytes."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    digest = xxhash.xxh3_128()
    for block in flat.split(_BLOCK):
        digest.update(memoryview(block.cpu().numpy()))
    return digest.hexdigest()


def _lasting(values: dict[str, Any]) -> dict[str, Any]:
    """A model configuration without what does not change its numbers."""
    return {
        name: _lasting(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in _VOLATILE and not name.startswith("_attn")
    }


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]
