"""A model written as the folder that its base was published as: names of weights and files that transformers of any version and vLLM read."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, Transpose, WeightConverter

from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.models.whole_weights import without_bars

SHARD = "5GB"
_CONFIG, _INDEX = "config.json", ".index.json"
_KEPT = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "LICENCE*", "NOTICE*")
"""Files of a published folder that go with its weights: configuration, processor, tokenizer, chat template, licence."""
_NOT_KEPT = ("adapter_config.json", "quantization.json", "trainer_state.json", "started.json", "complete.json", "log_state.json")
_DTYPES = ("dtype", "torch_dtype")
_OF_A_PLACE, _PLACE = (_CONFIG, "tokenizer_config.json"), ("_name_or_path", "name_or_path")
"""Files in which transformers keeps the path that something was once read from, and its names; it is of no other machine."""


def write_weights(model: Any, folder: str | Path, *, max_shard_size: str = SHARD) -> None:
    """Write a model's weights as safetensors, in shards, and its configuration, to a folder.

    They have the names that they were loaded under, but for towers whose wrapper (`vision_model` of CLIP and SigLIP) transformers 5 has
    taken out of its names: these are written with it, as such checkpoints are published. Weights that transformers turns by their shape
    when it reads them, and leaves so when it writes them (the experts of Qwen3-VL), are turned back. Older transformers, vLLM and what rests
    on them know no other names and shapes; newer transformers read both.
    """
    with without_bars(), _as_published(model):
        model.save_pretrained(folder, max_shard_size=max_shard_size)


@contextlib.contextmanager
def _as_published(model: Any) -> Iterator[None]:
    """While it lasts, what transformers undoes on saving holds wrappers and turned weights too, whatever names and shapes the model was read of.

    What it undoes is what loading did (`_weight_conversions`). The wrappers are its own table's: a prefix that it takes from the names of one
    class of tower, wherever in a model that stands.
    """
    loaded = getattr(model, "_weight_conversions", None)
    turned = _turned(model)
    of_them = {pattern for each in turned for pattern in each.source_patterns}
    done = [each for each in loaded or () if not of_them.intersection(each.source_patterns)]
    known = {(each.scope_prefix, each.prefix_to_remove) for each in done if isinstance(each, PrefixChange)}
    missing = [each for each in wrappers(model) if (each.scope_prefix, each.prefix_to_remove) not in known]
    model._weight_conversions = [*done, *missing, *turned]
    try:
        yield
    finally:
        model._weight_conversions = loaded


class _TurnedBack(Transpose):
    """Of weights as the model has them. Square ones stay: transformers, which goes by shapes, reads them as they are."""

    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **options: Any) -> Any:  # type: ignore[override]
        tensors = next(iter(input_dict.values()))
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        if tensor.shape[self.dim0] != tensor.shape[self.dim1]:
            tensor = tensor.detach().transpose(self.dim0, self.dim1).contiguous()
        return {self.get_target_pattern(input_dict, source_patterns, target_patterns): tensor}


class _Turned(Transpose):
    """transformers' own undoes itself by shape too, and on saving finds the shape that the model has: nothing to undo."""

    @property
    def reverse_op(self) -> Any:
        return _TurnedBack(dim0=self.dim1, dim1=self.dim0)


def _turned(model: Any) -> list[Any]:
    """transformers' conversions of a model that turn a weight where its shape is not the model's, in a form that saving undoes."""
    found = []
    for each in get_model_conversion_mapping(model, add_legacy=False):
        operations = getattr(each, "operations", ())
        if isinstance(each, WeightConverter) and any(isinstance(one, Transpose) and one.check_dims for one in operations):
            new = [
                _Turned(one.dim0, one.dim1, check_dims=True) if isinstance(one, Transpose) and one.check_dims else one
                for one in operations
            ]
            copy = WeightConverter(list(each._original_source_patterns), list(each._original_target_patterns), new)
            copy.scope_prefix = each.scope_prefix
            found.append(copy)
    return found


def wrappers(model: Any) -> list[Any]:
    """transformers' conversions of a model that take a tower's wrapper out of its names, each with the tower it is of (`scope_prefix`)."""
    every = get_model_conversion_mapping(model, add_legacy=False)
    return [e for e in every if isinstance(e, PrefixChange) and e.scope_prefix and e.prefix_to_remove and not e.model_prefix]


def copy_files(source: Path, folder: Path, dtype: torch.dtype | None = None) -> list[str]:
    """Copy what a published folder holds beside its weights, as it is, over what `write_weights` wrote; returns the names.

    dtype: what config.json is to say that the weights are of; None: config.json is left out. Code that a folder brings along
    is too.
    """
    found = sorted(
        {path for pattern in _KEPT for path in source.glob(pattern) if path.is_file() and not path.name.startswith(".")}
    )
    names = []
    for path in found:
        if path.name in _NOT_KEPT or path.name.endswith(_INDEX) or (path.name == _CONFIG and dtype is None):
            continue
        if path.name in _OF_A_PLACE:
            values = {key: value for key, value in read_json(path).items() if not (key in _PLACE and os.path.isabs(value or ""))}
            if path.name == _CONFIG:
                values = with_dtype(values, str(dtype).removeprefix("torch."))
            (folder / path.name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(path, folder / path.name)
        names.append(path.name)
    return names


def with_dtype(values: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json's values that say this number type, under the names that they say it by; where there is none, by the oldest."""
    changed = _renamed(values, dtype)
    return changed if any(name in changed for name in _DTYPES) else {**changed, "torch_dtype": dtype}


def _renamed(values: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {
        name: dtype
        if name in _DTYPES and value is not None
        else _renamed(value, dtype)
        if isinstance(value, dict) and name.endswith("config")
        else value
        for name, value in values.items()
    }


def weight_bytes(folder: Path, dtype: torch.dtype | None = None) -> int:
    """Bytes of the weights of a model folder, or those that they would have in another number type. Only headers are read."""
    found = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for entry in (value for name, value in header.items() if name != "__metadata__"):
            start, end = entry["data_offsets"]
            found += end - start if dtype is None else math.prod(entry["shape"]) * dtype.itemsize
    return found or sum(file.stat().st_size for file in folder.glob("pytorch_model*.bin"))
