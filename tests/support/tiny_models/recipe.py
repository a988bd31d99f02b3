"""What a tiny checkpoint is made of, for families that need no maker of their own, and the maker of them all."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from .parts import make_byte_tokenizer, make_tokenizer, random_model, save_model, save_processor, token_ids

_BASE = ("<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
HIDDEN, HEADS, LAYERS = 32, 4, 3

_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'MARK' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a family's tiny checkpoint is made of."""

    name: str
    """Of its classes, before `Config`, `ForConditionalGeneration` and `Processor`."""
    image: str
    """The token of a picture's feature, and the name of its id in the configuration."""
    images: tuple[str, str, dict[str, Any]]
    """Module and class of the image processor, below `transformers.models`, and its settings."""
    vision: dict[str, Any]
    text: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    mark: str = ""
    """What the chat template writes for a picture; "": the image token."""
    others: tuple[str, ...] = ()
    """Further special tokens."""
    named: dict[str, str] = field(default_factory=dict)
    """Attribute of the tokenizer -> special token."""
    ids: dict[str, str | tuple[str, ...]] = field(default_factory=dict)
    """Name in the configuration -> the token or tokens whose ids it has."""
    tokenizer: str = ""
    """Its class, where transformers takes a family's own whatever the folder says: of bytes, and not of words."""
    processor: str = ""
    """The class of the processor, where it is not of the family's name."""
    values: dict[str, Any] = field(default_factory=dict)
    """Of processor_config.json."""

    @property
    def needs_torchvision(self) -> bool:
        """Whether transformers has the family's image processor for torchvision only."""
        return not self.images[1].endswith("Pil")


def tower(patch: int = 8, image: int = 48) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image,
        "patch_size": patch,
    }


def make_tiny_by_recipe(
    recipe: Recipe,
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    heads: int = HEADS,
) -> Path:
    """Write a random checkpoint of a recipe to `folder` and return it. heads: of the text model, all of them as wide together.

    Raises AttributeError where the installed transformers does not have the family, and ImportError where it lacks what its image
    processor needs.
    """
    folder = Path(folder)
    name = recipe.name
    config_class, model_class = (getattr(transformers, f"{name}{kind}") for kind in ("Config", "ForConditionalGeneration"))
    special = (*_BASE, *dict.fromkeys((recipe.image, *recipe.others)))
    if recipe.tokenizer:
        tokenizer = make_byte_tokenizer(recipe.tokenizer, special, eos="<|im_end|>", pad="<|endoftext|>")
    else:
        tokenizer = make_tokenizer(special, bos=None, eos="<|im_end|>", pad="<|endoftext|>", named=recipe.named or None)
    ids = token_ids(tokenizer, *special)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": HIDDEN // heads,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": tied,
        **_widened(recipe.text, HEADS // heads),
    }
    found: dict[str, Any] = {
        key: ids[tokens] if isinstance(tokens, str) else [ids[token] for token in tokens] for key, tokens in recipe.ids.items()
    }
    if hasattr(config_class, "vocab_size"):
        found["vocab_size"] = len(tokenizer)
    config = config_class(vision_config=recipe.vision, text_config=text, tie_word_embeddings=tied, **recipe.config, **found)
    model = random_model(model_class, config, seed)
    save_model(folder, model, dtype, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"])
    module, images, settings = recipe.images
    image_processor = getattr(importlib.import_module(f"transformers.models.{module}"), images)(**settings)
    template = _TEMPLATE.replace("MARK", recipe.mark or recipe.image)
    save_processor(folder, recipe.processor or f"{name}Processor", tokenizer, image_processor, template, **recipe.values)
    return folder


def _widened(text: dict[str, Any], times: int) -> dict[str, Any]:
    """Settings of a text model with heads that are so many times as wide: the three axes of a position share each of them."""
    rope = text.get("rope_parameters", {})
    if "mrope_section" not in rope:
        return text
    return {**text, "rope_parameters": {**rope, "mrope_section": [each * times for each in rope["mrope_section"]]}}
