"""A blank picture for a process whose micro-batch has none, while another's has: weights are gathered, and gradients averaged, together."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mmdpo_trainers.models.families import EncodedPictures, Family
from mmdpo_trainers.training import model_parts
from mmdpo_trainers.training.batches.collator import PreferenceBatch

_SIDE = 56


def blank_picture(family: Family, processor: Any) -> EncodedPictures:
    """A small black picture as the model takes it."""
    return family.encode_pictures(processor, [Image.new("RGB", (_SIDE, _SIDE))])


def features_of_blank(model: nn.Module, batch: PreferenceBatch, blank: EncodedPictures) -> tuple[list[Tensor], Tensor | None]:
    """Run a blank picture through the vision tower in place of a batch's own, of which it has none.

    Returns its features for `model_parts.hidden_states`, where no token stands for them, and a zero to add to what backward goes through,
    so that all weights of the tower get gradients, of zeros; None: they are not trained.

    With features in hand a model runs the same modules in the same order as on a batch with pictures, cross-attention layers included, which
    ZeRO-3 expects of all processes.
    """
    found = model_parts.picture_features(model, dataclasses.replace(batch, pictures=blank).to(batch.input_ids.device))
    parts = [each.float().sum() for each in pytree.tree_leaves(found) if isinstance(each, Tensor) and each.requires_grad]
    return found, torch.stack(parts).sum() * 0 if parts else None
