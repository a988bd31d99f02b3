"""The LLaVA families: one grid of image tokens a picture, or that and a finer one made of tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.image_processing_utils import select_best_resolution

from mmdpo_trainers.models.families.family import Family
from mmdpo_trainers.models.families.images import Box, EncodedImages, View


class Llava(Family):
    """LLaVA-1.5, and other vision towers in its place: Pixtral's has pictures of every size, with marks at the ends of rows."""

    name = "llava"
    model_name = "LlavaForConditionalGeneration"
    processor_name = "LlavaProcessor"
    vision = ("vision_tower",)
    projector = ("multi_modal_projector",)
    official_regions = True

    @classmethod
    def fixed_grid(cls, config: Mapping[str, Any]) -> tuple[int, int] | None:
        vision = config["vision_config"]
        if vision.get("model_type") == "pixtral":
            return None
        side = int(vision["image_size"]) // int(vision["patch_size"])
        return side, side

    def views(
        self, processor: Any, inputs: dict[str, Tensor], index: int, size: tuple[int, int], block: list[int]
    ) -> tuple[View, ...]:
        step = processor.patch_size * getattr(processor, "spatial_merge_size", 1)
        sizes = inputs.get("image_sizes")
        height, width = inputs["pixel_values"].shape[-2:] if sizes is None else sizes[index].tolist()
        return (View(height // step, width // step),)

    def crops_centre(self, processor: Any) -> bool:
        return bool(getattr(processor.image_processor, "do_center_crop", False))

    def image_tokens(self, processor: Any, size: tuple[int, int], alone: bool = True) -> int:
        images = processor.image_processor
        if not getattr(images, "do_center_crop", False) or not hasattr(processor, "vision_feature_select_strategy"):
            return super().image_tokens(processor, size)
        crop, patch = images.crop_size, processor.patch_size
        # The class token counts where the model keeps it.
        kept = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
        return (crop["height"] // patch) * (crop["width"] // patch) + int(kept)


class LlavaNext(Family):
    """LLaVA-NeXT: the whole picture, then its tiles joined to one grid without their padding, each row with a mark at its end."""

    name = "llava_next"
    model_name = "LlavaNextForConditionalGeneration"
    processor_name = "LlavaNextProcessor"
    vision = ("vision_tower",)
    projector = ("multi_modal_projector", "image_newline")
    processor_counts = True

    def views(
        self, processor: Any, inputs: dict[str, Tensor], index: int, size: tuple[int, int], block: list[int]
    ) -> tuple[View, ...]:
        tile = inputs["pixel_values"].shape[-1]
        side = self._side(processor, tile)
        width, height = size
        best = select_best_resolution((height, width), processor.image_processor.image_grid_pinpoints)
        tokens, rows = processor._get_unpadded_features(height, width, side, side, best[0] // tile, best[1] // tile)
        # A strip may be too narrow for a single token.
        return (View(side, side), *([View(rows, tokens // rows, row_ends=1)] if rows else []))

    def _side(self, processor: Any, tile: int) -> int:
        return int(tile // processor.patch_size)


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision: as LLaVA-NeXT where a prompt has one picture; of several each is just one grid and a mark."""

    name = "llava_onevision"
    model_name = "LlavaOnevisionForConditionalGeneration"
    processor_name = "LlavaOnevisionProcessor"
    several_differ = True

    def encode_images(
        self, processor: Any, pictures: Sequence[Image.Image], alone: Sequence[bool] | None = None
    ) -> EncodedImages:
        alone = [True] * len(pictures) if alone is None else list(alone)
        single = [index for index, is_alone in enumerate(alone) if is_alone]
        beside = [index for index, is_alone in enumerate(alone) if not is_alone]
        encoded = [super().encode_images(processor, [pictures[index] for index in single])] if single else []
        if beside:
            encoded.append(self._encode_beside_others(processor, [pictures[index] for index in beside]))
        order = torch.tensor([*single, *beside]).argsort().tolist()
        tiles = max(each.inputs["pixel_values"].shape[1] for each in encoded)
        values = [pad(x, (0, 0) * 3 + (0, tiles - x.shape[1])) for x in (each.inputs["pixel_values"] for each in encoded)]
        columns = [[value for each in encoded for value in getattr(each, name)] for name in ("tokens", "blocks", "views")]
        tokens, blocks, views = ([values[place] for place in order] for values in columns)
        sizes = torch.cat([each.inputs["image_sizes"] for each in encoded])
        inputs = {
            "pixel_values": torch.cat(values)[order],
            "image_sizes": sizes[order],
            # transformers takes the number of pictures of each prompt.
            "batch_num_images": torch.tensor([1 if is_alone else 2 for is_alone in alone]),
        }
        return EncodedImages(inputs=inputs, tokens=tokens, blocks=blocks, views=views)

    def _encode_beside_others(self, processor: Any, pictures: list[Image.Image]) -> EncodedImages:
        """Pictures that have others beside them, which the processor makes square and does not tile."""
        encoded = processor.image_processor(images=[pictures if len(pictures) > 1 else pictures * 2], return_tensors="pt")
        inputs = {name: encoded[name][: len(pictures)] for name in ("pixel_values", "image_sizes")}
        side = int(processor.num_image_tokens**0.5)
        count = self._tokens_beside_others(processor)
        views: list[tuple[View, ...]] = [(View(side, side, square(*picture.size), marks=1),) for picture in pictures]
        blocks = [[self.image_token_id(processor)] * count] * len(pictures)
        return EncodedImages(inputs=inputs, tokens=[count] * len(pictures), blocks=blocks, views=views)

    def image_tokens(self, processor: Any, size: tuple[int, int], alone: bool = True) -> int:
        return super().image_tokens(processor, size) if alone else self._tokens_beside_others(processor)

    def _tokens_beside_others(self, processor: Any) -> int:
        return int(processor.num_image_tokens + 1 - (processor.vision_feature_select_strategy == "default"))

    def model_inputs(self, pictures: EncodedImages, rows: Sequence[Sequence[int]], input_ids: Tensor) -> dict[str, Tensor]:
        return {**pictures.inputs, "batch_num_images": torch.tensor([len(row) for row in rows if row])}

    def features(self, body: nn.Module, pictures: EncodedImages) -> list[Tensor]:
        numbers = pictures.inputs["batch_num_images"]
        found: dict[int, Tensor] = {}
        for number in numbers.unique().tolist():
            chosen = (numbers == number).nonzero()[:, 0]
            inputs = {name: value[chosen] for name, value in pictures.inputs.items() if name != "batch_num_images"}
            # Those beside others come as one prompt, which must not be of one picture: a last one that is not there does no harm.
            prompts = [1] * len(chosen) if number == 1 else [len(chosen) + 1]
            output = body.get_image_features(**inputs, batch_num_images=torch.tensor(prompts), return_dict=True)  # type: ignore[operator]
            found.update(zip(chosen.tolist(), output.pooler_output, strict=True))
        return [found[index] for index in range(len(numbers))]

    def _side(self, processor: Any, tile: int) -> int:
        return int(processor.num_image_tokens**0.5)


def square(width: int, height: int) -> Box:
    """The square around a picture, in shares of its width and height."""
    side = max(width, height)
    x, y = (side - width) / 2 / width, (side - height) / 2 / height
    return -x, -y, 1 + x, 1 + y
