"""A model in memory, with what belongs to it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmdpo_trainers.models.families import Family, family_of, image_layers
from mmdpo_trainers.models.quantized import float_dtype
from mmdpo_trainers.models.template_date import TemplateDate
from mmdpo_trainers.models.token_rules import TextEncoder, end_tokens


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its processor, and what the stages ask about its family."""

    model: Any
    processor: Any
    path: Path
    adapter: Path | None = None
    date: TemplateDate = field(default_factory=TemplateDate.now)
    """What a chat template that prints the date is told."""

    @functools.cached_property
    def texts(self) -> TextEncoder:
        """Prompts and answers as token ids."""
        return TextEncoder(self.processor, image_token_id=self.image_token_id, end_ids=self.end_ids, date=self.date)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return float_dtype(self.model)

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def image_token_id(self) -> int:
        return int(self.model.config.image_token_id)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the language model."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def image_layers(self) -> Sequence[int]:
        """Decoder layers that see pictures, see `families.image_layers`."""
        return image_layers(self.model.config)

    @property
    def family(self) -> Family:
        return family_of(self.model)

    @property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end a response."""
        own = self.tokenizer.eos_token_id
        return frozenset(end_tokens(self.model.generation_config) or ([] if own is None else [own]))

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else min(self.end_ids, default=0)
