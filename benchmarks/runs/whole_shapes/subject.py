"""Model, processor and records of a shape, on the device."""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from benchmarks.measure import ROOT
from benchmarks.runs.training_step.setting import Setting, records
from benchmarks.runs.training_step.sides import Subject
from benchmarks.runs.whole_shapes.shapes import SHAPES, Size
from mmdpo_trainers.models.families import family_of
from mmdpo_trainers.models.processors import load_processor

# The makers of tiny checkpoints are the tests' own: tokenizer, processor and ids of special tokens come from these, sizes from the table.
sys.path.insert(0, str(ROOT / "tests" / "support"))

from tiny_models import make_tiny_llava, make_tiny_qwen, make_tiny_qwen3_5  # noqa: E402


class NotHere(Exception):  # noqa: N818 - an answer, not an error
    """A shape or a way to train cannot be had here; the message says why."""


@dataclass(frozen=True)
class Family:
    """How a family's folder is made, and where its configuration has the sizes."""

    needs: str
    """The class of transformers that has to be there."""
    folder: Callable[..., Path]
    vision: Callable[[Size], dict[str, Any]]


def _llava_folder(folder: Path, size: Size) -> Path:
    return make_tiny_llava(folder, image_size=size.side, patch=size.patch)


def _qwen_folder(maker: Callable[..., Path]) -> Callable[..., Path]:
    # Every picture is `side` pixels wide and high, neither shrunk nor enlarged.
    return lambda folder, size: maker(folder, patch=size.patch, min_pixels=size.side**2, max_pixels=size.side**2)


def _llava_vision(size: Size) -> dict[str, Any]:
    return {
        "hidden_size": size.vision_width,
        "intermediate_size": size.vision_mlp,
        "num_hidden_layers": size.vision_layers,
        "num_attention_heads": size.vision_heads,
    }


def _qwen_vision(size: Size) -> dict[str, Any]:
    return {
        "hidden_size": size.vision_width,
        "intermediate_size": size.vision_mlp,
        "depth": size.vision_layers,
        "num_heads": size.vision_heads,
        "out_hidden_size": size.width,
    }


def _qwen2_5_vision(size: Size) -> dict[str, Any]:
    """Windows of eight by eight patches; in every eighth layer, or in the last of fewer, patches see the whole picture."""
    last = size.vision_layers - 1
    whole = [layer for layer in range(7, size.vision_layers, 8)] or [last]
    return {**_qwen_vision(size), "window_size": 8 * size.patch, "fullatt_block_indexes": whole}


FAMILIES = {
    "LLaVA-1.5-7B": Family("LlavaForConditionalGeneration", _llava_folder, _llava_vision),
    "Qwen2.5-VL-7B": Family("Qwen2_5_VLForConditionalGeneration", _qwen_folder(make_tiny_qwen), _qwen2_5_vision),
    "Qwen3.5-9B": Family("Qwen3_5ForConditionalGeneration", _qwen_folder(make_tiny_qwen3_5), _qwen_vision),
}


class Shape:
    """A model of random weights on `device`, which all trainers share: each has modules and an adapter of its own around them.

    Raises NotHere where the installed transformers lacks the family.
    """

    def __init__(self, name: str, scale: str, device: torch.device, dtype: torch.dtype) -> None:
        import transformers

        self.name, self.device, self.dtype = name, device, dtype
        self._records: dict[str, Any] = {}
        self.size, family = SHAPES[name][scale], FAMILIES[name]
        if not hasattr(transformers, family.needs):
            raise NotHere(f"transformers {transformers.__version__} has no {family.needs}")
        with tempfile.TemporaryDirectory() as temporary:
            folder = family.folder(Path(temporary) / "model", self.size)
            self.config = _configuration(AutoConfig.from_pretrained(folder), self.size, family.vision(self.size))
            self.generation = GenerationConfig.from_pretrained(folder)
            self.processor = load_processor(folder, self.config.model_type)

    @cached_property
    def model(self) -> Any:
        """Made on the device in its dtype: no weight is ever elsewhere."""
        torch.manual_seed(0)
        with torch.device(self.device):
            model = AutoModelForImageTextToText.from_config(self.config, dtype=self.dtype)
        model.generation_config = self.generation
        return model.requires_grad_(False)

    @property
    def bytes(self) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())

    @property
    def family(self) -> Any:
        return family_of(self.model)

    def own_modules(self) -> Any:
        """The model with modules of its own around the same weights."""
        shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        return copy.deepcopy(self.model, shared)

    def subject(self, method: str) -> Subject:
        """What a trainer of `method` is given."""
        on_gpu = self.device.type == "cuda"
        # Beside a GPU pictures are read while it is at work, for all sides alike.
        where = {"bf16": True, "dataloader_num_workers": 2} if on_gpu else {"use_cpu": True, "bf16": False}
        return Subject(
            model=self.own_modules,
            processor=self.processor,
            data=self.records(method),
            lora_r=self.size.rank(method),
            arguments=where,
        )

    def records(self, method: str) -> Any:
        """Sequence prompts about five pictures; the chosen response is the longer one."""
        if method not in self._records:
            self._records[method] = self._made(method)
        return self._records[method]

    def _made(self, method: str) -> Any:
        size = self.size
        setting = Setting(
            pictures=size.pictures,
            side=size.side,
            response_tokens=size.chosen,
            records=size.records,
            corrupted=method == "mdpo",
        )
        data = records(setting)
        rejected = [
            [{**turn, "content": " ".join(turn["content"].split()[: size.rejected])} for turn in turns]
            for turns in data["rejected"]
        ]
        return data.remove_columns("rejected").add_column("rejected", rejected, feature=data.features["rejected"])


def _configuration(tiny: Any, size: Size, vision: dict[str, Any]) -> Any:
    """The tiny checkpoint's configuration with the table's sizes."""
    values = tiny.to_dict()
    text = {
        "hidden_size": size.width,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        **dict(size.extra),
    }
    # Made anew for so many layers.
    values["text_config"] = {name: value for name, value in values["text_config"].items() if name != "layer_types"} | text
    values["vision_config"] |= vision
    if "vision_feature_layer" in values:
        values["vision_feature_layer"] = -2
    return type(tiny)(**values)
