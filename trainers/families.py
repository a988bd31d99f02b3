"""The model families that can be used, and what differs between them: placeholders, pictures, image tokens and positions."""

from __future__ import annotations

import abc
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from PIL import Image
from torch import Tensor

from mmdpo_trainers.data.records import IMAGE_TOKEN


@dataclass(frozen=True, kw_only=True)
class EncodedPictures:
    """Pictures as a model's vision tower takes them."""

    pixel_values: Tensor
    """LLaVA: (P, 3, H, W). Qwen: (patches of all pictures, values of a patch), picture after picture. Floating."""
    grids: Tensor | None
    """(P, 3) int64, Qwen's `image_grid_thw`: frames, rows and columns of vision patches. None: all pictures have one shape."""
    tokens: list[int]
    """(P) image tokens of each picture in the language model."""
    patch_grids: list[tuple[int, int]]
    """(P) rows and columns of image tokens of each picture."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The model's keyword arguments."""
        grids = {} if self.grids is None else {"image_grid_thw": self.grids}
        return {"pixel_values": self.pixel_values, **grids}


class Family(abc.ABC):
    """A model family; `family_of` finds a model's. It holds no weights, so it may travel to another process.

    config: the model's configuration; only positions need it.
    """

    name: ClassVar[str]
    """`model_type` in config.json."""
    model_name: ClassVar[str]
    processor_name: ClassVar[str]
    vision: ClassVar[tuple[str, ...]]
    """Modules of the vision tower, by their names below the base model."""
    projector: ClassVar[tuple[str, ...]]
    """Modules that bring features of the vision tower to the language model; they may lie inside the tower."""

    def __init__(self, config: Any = None) -> None:
        self.config = config

    @property
    def model_class(self) -> Any:
        """The transformers class with the language-model head."""
        return getattr(transformers, self.model_name)

    @abc.abstractmethod
    def placeholder(self, processor: Any) -> str:
        """What one `<image>` of a prompt becomes: text that holds one image token."""

    @abc.abstractmethod
    def encode_pictures(self, processor: Any, pictures: Sequence[Image.Image]) -> EncodedPictures:
        """One or more RGB pictures through the processor's image processor."""

    @abc.abstractmethod
    def picture_tokens(self, processor: Any, size: tuple[int, int]) -> int:
        """Image tokens of a picture of `size` (width, height), without its pixels."""

    def expand(self, processor: Any, text: str, counts: Sequence[int]) -> str:
        """`text` with its k-th image token repeated `counts[k]` times. ValueError where their numbers differ."""
        token = image_token(processor)
        pieces = text.split(token)
        if len(pieces) != len(counts) + 1:
            raise ValueError(f"text: expected {len(counts)} image tokens {token}, one a picture, got {len(pieces) - 1}")
        return "".join(piece + token * count for piece, count in zip(pieces, [*counts, 0], strict=True))

    def position_ids(self, input_ids: Tensor, grids: Tensor | None, attention_mask: Tensor | None = None) -> Tensor | None:
        """(3, B, S) int64 positions of rows of token ids (B, S), their pictures' `grids` (P, 3) in reading order; None where
        the model counts tokens itself, one by one."""
        return None


class _Llava(Family):
    name = "llava"
    model_name = "LlavaForConditionalGeneration"
    processor_name = "LlavaProcessor"
    vision = ("vision_tower",)
    projector = ("multi_modal_projector",)

    def placeholder(self, processor: Any) -> str:
        return image_token(processor)

    def encode_pictures(self, processor: Any, pictures: Sequence[Image.Image]) -> EncodedPictures:
        pixels = processor.image_processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        grid = pixels.shape[-2] // processor.patch_size, pixels.shape[-1] // processor.patch_size
        count, number = _llava_tokens(processor, *grid), len(pictures)
        return EncodedPictures(pixel_values=pixels, grids=None, tokens=[count] * number, patch_grids=[grid] * number)

    def picture_tokens(self, processor: Any, size: tuple[int, int]) -> int:
        images = processor.image_processor
        if not getattr(images, "do_center_crop", False):
            return self.encode_pictures(processor, [Image.new("RGB", size)]).tokens[0]
        crop, patch = images.crop_size, processor.patch_size
        return _llava_tokens(processor, crop["height"] // patch, crop["width"] // patch)


def _llava_tokens(processor: Any, rows: int, columns: int) -> int:
    """Image tokens of a picture of so many patches; the class token counts where the model keeps it."""
    kept = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    return rows * columns + int(kept)


class _Qwen25VL(Family):
    name = "qwen2_5_vl"
    model_name = "Qwen2_5_VLForConditionalGeneration"
    processor_name = "Qwen2_5_VLProcessor"
    vision = ("visual",)
    projector = ("visual.merger",)

    def placeholder(self, processor: Any) -> str:
        return f"<|vision_start|>{image_token(processor)}<|vision_end|>"

    def encode_pictures(self, processor: Any, pictures: Sequence[Image.Image]) -> EncodedPictures:
        encoded = processor.image_processor(images=list(pictures), return_tensors="pt")
        grids = encoded["image_grid_thw"]
        merge = processor.image_processor.merge_size
        patch_grids = [(rows // merge, columns // merge) for _, rows, columns in grids.tolist()]
        tokens = [rows * columns for rows, columns in patch_grids]
        return EncodedPictures(pixel_values=encoded["pixel_values"], grids=grids, tokens=tokens, patch_grids=patch_grids)

    def picture_tokens(self, processor: Any, size: tuple[int, int]) -> int:
        images = processor.image_processor
        return int(images.get_number_of_image_patches(size[1], size[0])) // images.merge_size**2

    def position_ids(self, input_ids: Tensor, grids: Tensor | None, attention_mask: Tensor | None = None) -> Tensor:
        if self.config is None:
            raise ValueError("family: positions need the model's configuration; make it with family_of(model)")
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        if grids is None or not len(grids):
            return (kept.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
        kinds = (input_ids == self.config.image_token_id).int()
        model: Any = _Weightless(transformers.Qwen2_5_VLModel, self.config)
        return model.get_rope_index(input_ids, mm_token_type_ids=kinds, image_grid_thw=grids, attention_mask=kept)[0]


class _Weightless:
    """Methods of a model class that need its configuration only, without a model: in a data loader's process there is none."""

    def __init__(self, model_class: type, config: Any) -> None:
        self.model_class, self.config = model_class, config

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.model_class, name)
        return types.MethodType(found, self) if isinstance(found, types.FunctionType) else found


FAMILIES: dict[str, type[Family]] = {family.name: family for family in (_Llava, _Qwen25VL)}
"""By `model_type` of config.json."""


def family_of(source: Any) -> Family:
    """The family of a model (inside PEFT or not), of its configuration, or of its processor (which has no positions to give).

    Raises ValueError where it is none of `FAMILIES`.
    """
    config = getattr(source, "config", source)
    kind = getattr(config, "model_type", None)
    if kind in FAMILIES:
        return FAMILIES[kind](config)
    for family in FAMILIES.values():
        if any(parent.__name__ == family.processor_name for parent in type(source).__mro__):
            return family()
    raise ValueError(f"model: expected a family among {', '.join(FAMILIES)}, got {kind or type(source).__name__}")


def image_token(processor: Any) -> str:
    """The text of the processor's image token, which stands for one image feature."""
    return str(getattr(processor, "image_token", None) or IMAGE_TOKEN)
