"""A scalar head on a policy's last hidden state, at the last token of each response."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from mmdpo_trainers.models.quantized import float_dtype
from mmdpo_trainers.training import model_parts
from mmdpo_trainers.training.batches.collator import PreferenceBatch
from mmdpo_trainers.training.config import PreferenceConfig
from mmdpo_trainers.training.model_parts import base_of

HEAD = "reward_head"
"""Name of the head below the transformers model, and of its weight in an adapter's file."""


def add_head(base: Any, seed: int) -> None:
    """Put an untrained head (H -> 1, no bias) on a transformers model: weights N(0, initializer_range^2) that follow from the seed.

    Its dtype is the model's, float32 at least: a reward of three digits in bfloat16 would rank nothing. As in transformers' classification
    heads, on which TRL's RewardTrainer works (`torch.nn.Linear(H, 1, bias=False)`).
    """
    text = base.config.get_text_config()
    head = nn.Linear(int(text.hidden_size), 1, bias=False, dtype=torch.promote_types(float_dtype(base), torch.float32))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.normal_(0.0, float(getattr(text, "initializer_range", 0.02)), generator=generator)
    setattr(base, HEAD, head.to(next(base.parameters()).device))


def with_head(model: Any, args: PreferenceConfig, peft_config: PeftConfig | None) -> PeftConfig | None:
    """Put a head on a plain model, and return the adapter's configuration with the head among what is trained and saved.

    None: the model is a PeftModel, which has a trained head. Raises ValueError for one without, and for an adapter on a head.
    """
    if isinstance(model, PeftModel):
        if not isinstance(getattr(base_of(model), HEAD, None), ModulesToSaveWrapper):
            raise ValueError(
                f"model: it has an adapter and no {HEAD}; merge the adapter (merge_and_unload) and pass the model, or go on from a "
                "reward model's own checkpoint"
            )
        return peft_config
    config = copy.deepcopy(peft_config) if peft_config is not None else model_parts.lora_config(model, args)
    saved = getattr(config, "modules_to_save", None)
    if not hasattr(config, "modules_to_save"):
        raise ValueError(f"peft_config: expected an adapter with modules_to_save, such as LoRA, got {type(config).__name__}")
    add_head(model, args.seed)
    config.modules_to_save = [*(saved or ()), HEAD]
    return config


def check_trained(model: Any) -> None:
    """ValueError where the head has an adapter in place of being trained, or the unused output head is trained."""
    base = base_of(model)
    if not isinstance(getattr(base, HEAD, None), ModulesToSaveWrapper):
        raise ValueError(f"peft_config: target_modules reaches the {HEAD}, which is trained whole; name the modules to adapt")
    if any(parameter.requires_grad for parameter in base.get_output_embeddings().parameters()):
        raise ValueError(
            "peft_config: a reward model has no use for the output head; leave it out of target_modules and modules_to_save"
        )


def scores(model: Any, hidden: Tensor, batch: PreferenceBatch) -> Tensor:
    """(n, b) rewards of each record's branches, in the head's dtype. hidden: (B, S, H), the last hidden states."""
    head: Any = getattr(base_of(model), HEAD)
    rows = hidden.flatten(0, 1)[batch.last_rows]
    # Autocast would round products and reward to 16 bits.
    with torch.autocast(rows.device.type, enabled=False):
        found: Tensor = head(rows.to(next(head.parameters()).dtype))
    return found.view(len(batch.ids), -1)
