"""What a model asks of a configuration, from its settings and its family's declaration; no weight is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmdpo_trainers.answers.attention_ratios import resolve_layer
from mmdpo_trainers.models.chat_format import render_prompt, template_of
from mmdpo_trainers.models.families import family_of, fixed_grid, image_layers, tree_refusal
from mmdpo_trainers.models.loading import open_folder
from mmdpo_trainers.models.processors import load_processor
from mmdpo_trainers.run.model_preflight import without_weights
from mmdpo_trainers.training.model_parts import has_experts, language_linears

_PROMPT = "<image>\nWhat is this?"


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model, as far as a configuration for it is concerned."""

    config: Any
    family: str
    declared: bool
    warning: str | None
    """What is to be said of a family that nobody has checked."""
    dtype: str | None
    """The number type of the checkpoint, as its config.json says it."""
    layers: Sequence[int]
    """Decoder layers that see pictures."""
    middle: int
    """The one of them whose attention counts where nobody chose."""
    same_size: bool
    """Whether every picture has the same number of tokens."""
    crops: bool
    """Whether of an oblong picture only the centred square is seen."""
    prompt: str
    """A question about a picture, in the model's chat format."""
    has_template: bool
    thinks: bool
    """Whether the chat template can begin an answer with a part of thinking."""
    adapted: str
    """What LoRA adapts where nobody says otherwise."""
    no_trees: str | None
    """Why pairs are not packed into token trees; None: they are."""
    has_experts: bool


def facts_of(model: str, revision: str | None = None) -> ModelFacts:
    """The facts of a model folder, of an id on the hub (whose weights are not fetched), or of a shipped model.

    Raises StageError where it cannot be used.
    """
    folder, config = open_folder(model, revision, weights=False)
    processor = load_processor(folder, config.model_type)
    family, template = family_of(config), template_of(processor) or ""
    shape = without_weights(family, config)
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers = image_layers(config)
    prefix, names = ("the language tower", []) if shape is None else language_linears(shape)
    dtype = getattr(config, "dtype", None)
    return ModelFacts(
        config=config,
        family=family.name,
        declared=type(family).is_declared,
        warning=getattr(family, "unchecked", None),
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        layers=layers,
        middle=resolve_layer(layers),
        same_size=fixed_grid(values) is not None,
        crops=family.crops_centre(processor),
        prompt=render_prompt(processor, _PROMPT),
        has_template=bool(template),
        thinks="enable_thinking" in template,
        adapted=f"every linear of {prefix}{': ' if names else ''}{', '.join(names)}",
        no_trees=None if shape is None else tree_refusal(shape),
        has_experts=shape is not None and has_experts(shape),
    )
