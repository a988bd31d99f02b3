"""The Qwen-VL families and those that follow them: pictures of every size, positions on three axes; in Qwen3-VL features for several layers,
in Qwen3.5 layers of linear attention."""

from __future__ import annotations

import inspect
import types
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor

from mmdpo_trainers.models.families.family import Family
from mmdpo_trainers.models.families.images import EncodedImages, View


class Qwen2VL(Family):
    name = "qwen2_vl"
    model_name = "Qwen2VLForConditionalGeneration"
    processor_name = "Qwen2VLProcessor"
    body_name = "Qwen2VLModel"
    vision: tuple[str, ...] = ("visual",)
    projector: tuple[str, ...] = ("visual.merger",)
    token_types: ClassVar[str | None] = "mm_token_type_ids"

    def placeholder(self, processor: Any) -> str:
        return f"<|vision_start|>{self.image_token(processor)}<|vision_end|>"

    def views(
        self, processor: Any, inputs: dict[str, Tensor], index: int, size: tuple[int, int], block: list[int]
    ) -> tuple[View, ...]:
        _, rows, columns = inputs["image_grid_thw"][index].tolist()
        merge = processor.image_processor.merge_size
        return (View(rows // merge, columns // merge),)

    def image_tokens(self, processor: Any, size: tuple[int, int], alone: bool = True) -> int:
        images = processor.image_processor
        return int(images.get_number_of_image_patches(size[1], size[0])) // images.merge_size**2

    def hidden_states(self, body: Any, input_ids: Tensor, features: list[Tensor], feature_rows: Tensor, **inputs: Any) -> Tensor:
        # Positions are given, so the decoder itself needs nothing else.
        if features:
            inputs |= self.decoder_inputs(body, input_ids, torch.cat(features)[feature_rows])
        else:
            inputs["input_ids"] = input_ids
        return body.get_decoder()(**inputs).last_hidden_state  # type: ignore[no-any-return]

    def decoder_inputs(self, body: Any, input_ids: Tensor, placed: Tensor) -> dict[str, Any]:
        """The decoder's arguments that hold the features `placed` (K, F)."""
        return {"inputs_embeds": self.embeds(body, input_ids, placed)}

    def position_ids(self, input_ids: Tensor, grids: Tensor | None, attention_mask: Tensor | None = None) -> Tensor:
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        if grids is None or not len(grids):
            return (kept.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
        kinds = (input_ids == self.known_config.image_token_id).int()
        model: Any = Weightless(getattr(transformers, self.body_name), self.known_config)
        return model.get_rope_index(input_ids, mm_token_type_ids=kinds, image_grid_thw=grids, attention_mask=kept)[0]


class Qwen25VL(Qwen2VL):
    name = "qwen2_5_vl"
    model_name = "Qwen2_5_VLForConditionalGeneration"
    processor_name = "Qwen2_5_VLProcessor"
    body_name = "Qwen2_5_VLModel"


class Qwen3VL(Qwen2VL):
    """A picture's features are added to the hidden states behind the first layers too: they travel side by side with the embedding's."""

    name = "qwen3_vl"
    model_name = "Qwen3VLForConditionalGeneration"
    processor_name = "Qwen3VLProcessor"
    body_name = "Qwen3VLModel"
    projector = ("visual.merger", "visual.deepstack_merger_list")

    def split(self, output: Any, pictures: EncodedImages) -> list[Tensor]:
        deep = [torch.cat(list(each)) if isinstance(each, list | tuple) else each for each in output.deepstack_features]
        by_layer = [super().split(output, pictures), *(each.split(pictures.tokens) for each in deep)]
        return [torch.cat(features, dim=-1) for features in zip(*by_layer, strict=True)]

    def decoder_inputs(self, body: Any, input_ids: Tensor, placed: Tensor) -> dict[str, Any]:
        # Not by the embedding, whose weight may be in shards.
        first, *deep = placed.split(self.known_config.get_text_config().hidden_size, dim=-1)
        places = input_ids == self.known_config.image_token_id
        return {**super().decoder_inputs(body, input_ids, first), "visual_pos_masks": places, "deepstack_visual_embeds": deep}


class Qwen3VLMoe(Qwen3VL):
    """Qwen3-VL with experts in its text layers."""

    name = "qwen3_vl_moe"
    model_name = "Qwen3VLMoeForConditionalGeneration"
    body_name = "Qwen3VLMoeModel"


class Qwen35(Qwen2VL):
    """Qwen3.5, 3.6 and 3.8: three of four layers carry a state in place of attending."""

    name = "qwen3_5"
    model_name = "Qwen3_5ForConditionalGeneration"
    processor_name = "Qwen3VLProcessor"
    body_name = "Qwen3_5Model"


class Qwen35Moe(Qwen35):
    """The same with experts in its text layers."""

    name = "qwen3_5_moe"
    model_name = "Qwen3_5MoeForConditionalGeneration"
    body_name = "Qwen3_5MoeModel"


class Weightless:
    """Methods of a model class that need its configuration only, without a model: in a data loader's process there is none."""

    def __init__(self, model_class: type, config: Any) -> None:
        self.model_class, self.config = model_class, config

    def __getattr__(self, name: str) -> Any:
        found = inspect.getattr_static(self.model_class, name)
        if isinstance(found, staticmethod):
            return found.__func__
        found = getattr(self.model_class, name)
        return types.MethodType(found, self) if isinstance(found, types.FunctionType) else found
