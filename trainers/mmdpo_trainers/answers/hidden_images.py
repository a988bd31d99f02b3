"""Answers of a model that does not see some tokens of its pictures: keys that nobody attends to, in all layers; positions stay.

Bias-driven hallucination sampling (arXiv 2407.02477, equation 6) calls this attention masking. The hidden tokens go through the model as
they are; the attention mask is zero at them, for the prompt and for every generated token, while positions are those of the whole prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.models.encode import EncodedPrompts
from mmdpo_trainers.models.families import Family, hiding_refusal
from mmdpo_trainers.models.loaded import LoadedModel

Hidden = Callable[[int, int], np.ndarray]
"""(record's index, number of its image tokens) -> bool for each of them in reading order: whether it is hidden."""


def check_hiding(family: Family, config: Any) -> None:
    """ConfigError, naming the family, where image tokens cannot be hidden from a model of this configuration."""
    reason = hiding_refusal(family, config)
    if reason is None and family.prefix:
        reason = "its prompts see themselves both ways, which generation with hidden tokens does not keep exactly"
    if reason is not None:
        raise ConfigError(f"family {family.name}: image tokens cannot be hidden: {reason}; choose another model")


def hide_images(loaded: LoadedModel, encoded: EncodedPrompts, hidden: Hidden) -> None:
    """Change the inputs of a padded batch so that generation does not see the image tokens that `hidden` names.

    The model then gives the logits of a padded batch with this attention mask and these position ids, patched or not. Without pictures
    in a row nothing is hidden in it.
    """
    check_hiding(loaded.family, loaded.model.config)
    inputs = encoded.inputs
    seen = inputs["attention_mask"]
    # What generate counts from the mask would close the gaps.
    inputs["position_ids"] = _positions(loaded, inputs)
    inputs["attention_mask"] = seen.clone()
    is_image = inputs["input_ids"] == loaded.image_token_id
    for row in range(len(seen)):
        columns = is_image[row].nonzero().flatten()
        if len(columns):
            mask = torch.from_numpy(hidden(row, len(columns))).to(columns.device)
            inputs["attention_mask"][row, columns[mask]] = 0


def _positions(loaded: LoadedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Position ids of the whole prompts: (B, S), or (3, B, S) where they follow pictures."""
    ids, seen = inputs["input_ids"], inputs["attention_mask"]
    found = loaded.family.position_ids(ids, inputs.get("image_grid_thw"), seen)
    return (seen.cumsum(-1) - 1).masked_fill(seen == 0, 0) if found is None else found
