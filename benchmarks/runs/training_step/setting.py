"""The model and the records of the training-step benchmark."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mmdpo_trainers.shapes.model import build_processor

SIDE, PATCH = 196, 14
"""14 x 14 = 196 tokens a picture."""

QUESTION = 44
"""Prompt tokens that are no picture's."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes of model and records.

    The proportions are those of LLaVA-1.5-7B: an MLP 2.7 times as wide as the model, a vision tower with 4.5 % of the language tower's
    weights (LLaVA: 304 M of 6.5 G) that sees about as many tokens as it hands on, an output head with 2 %, LoRA of rank width / 32.
    """

    layers: int = 8
    width: int = 640
    heads: int = 10
    mlp: int = 1728
    vocabulary: int = 1280
    vision_layers: int = 3
    vision_width: int = 256
    vision_mlp: int = 640
    lora_r: int = 20
    pictures: int = 5
    response_tokens: int = 40
    """Response tokens, the end token not counted."""
    records: int = 8
    questions: int = 1
    """Records in a row about the same pictures."""
    corrupted: bool = False
    """Whether records bring a corrupted picture, for mDPO: the middle one, so that half of the others stand before it."""
    side: int = SIDE
    seed: int = 0

    @property
    def prompt_tokens(self) -> int:
        return self.pictures * (self.side // PATCH) ** 2 + QUESTION

    def but(self, **changes: Any) -> Setting:
        return dataclasses.replace(self, **changes)


SMALL = Setting(
    layers=1,
    width=32,
    heads=2,
    mlp=64,
    vision_layers=2,
    vision_width=64,
    vision_mlp=64,
    side=28,
    pictures=2,
    response_tokens=3,
    records=4,
)
"""To see that everything runs."""


def processor_of(setting: Setting) -> Any:
    """A Pillow image processor and a word-level tokenizer."""
    processor = build_processor()
    processor.patch_size = PATCH
    processor.tokenizer.model_max_length = 8192
    processor.image_processor.size = {"shortest_edge": setting.side}
    processor.image_processor.crop_size = {"height": setting.side, "width": setting.side}
    return processor


def build(setting: Setting, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    """A LLaVA of random weights, the same for the same setting."""
    processor = processor_of(setting)
    vision = CLIPVisionConfig(
        hidden_size=setting.vision_width,
        intermediate_size=setting.vision_mlp,
        num_hidden_layers=setting.vision_layers,
        num_attention_heads=setting.vision_width // 64,
        image_size=setting.side,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        hidden_size=setting.width,
        intermediate_size=setting.mlp,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        vocab_size=setting.vocabulary,
        max_position_embeddings=8192,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=processor.image_token_id, vision_feature_layer=-2)
    torch.manual_seed(setting.seed)
    model = LlavaForConditionalGeneration(config).to(dtype)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return model


def records(setting: Setting) -> Any:
    """`datasets.Dataset` with TRL's columns: sequence prompts of `prompt_tokens` tokens, responses of `response_tokens` and an end.

    Pictures of one record are never another's, except within the `questions` about the same pictures.
    """
    import datasets

    found = [_record(setting, index) for index in range(setting.records)]
    return datasets.Dataset.from_list(found, features=_features(setting, datasets))


def _features(setting: Setting, datasets: Any) -> Any:
    message = [
        {"role": datasets.Value("string"), "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}]}
    ]
    plain = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
    pictures = datasets.List(datasets.Image())
    columns = {"id": datasets.Value("string"), "prompt": message, "chosen": plain, "rejected": plain, "images": pictures}
    columns["target"] = datasets.Value("int64")
    if setting.corrupted:
        columns["rejected_images"] = pictures
    return datasets.Features(columns)


def _record(setting: Setting, index: int) -> dict[str, Any]:
    group, target = index // setting.questions, setting.pictures // 2
    pictures = [_noise(setting.side, group * setting.pictures + place) for place in range(setting.pictures)]
    content: list[dict[str, Any]] = []
    for place in range(setting.pictures):
        content += [{"type": "text", "text": f"Image{place + 1}:"}, {"type": "image", "text": None}]
    content.append({"type": "text", "text": "In Image1, " + _words(_question_words(setting), index)})
    record = {
        "id": f"record {index}",
        "prompt": [{"role": "user", "content": content}],
        "chosen": [{"role": "assistant", "content": _words(setting.response_tokens, 2 * index + 1)}],
        "rejected": [{"role": "assistant", "content": _words(setting.response_tokens, 2 * index + 2)}],
        "images": pictures,
        "target": target,
    }
    if setting.corrupted:
        crop = pictures[target].crop((0, 0, setting.side // 3, setting.side // 3)).resize((setting.side, setting.side))
        record["rejected_images"] = [crop if place == target else picture for place, picture in enumerate(pictures)]
    return record


def _question_words(setting: Setting) -> int:
    """`user :`, `assistant :`, `image1 :` a picture, and `in image1 ,` are the prompt's other words."""
    return QUESTION - 4 - 2 * setting.pictures - 3


def _words(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    words = ["red", "green", "blue", "circle", "square", "star", "left", "right", "and", "the", "is", "on"]
    return " ".join(words[place] for place in torch.randint(len(words), (count,), generator=generator))


@lru_cache(maxsize=512)
def _noise(side: int, number: int) -> Image.Image:
    generator = torch.Generator().manual_seed(number)
    return Image.fromarray(torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8).numpy())
