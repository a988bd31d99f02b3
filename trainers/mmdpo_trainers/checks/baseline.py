"""A sequence by itself through the unpatched model, as its own processor makes it: what everything else is held to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmdpo_trainers.data.corruption import Corruption, corrupt
from mmdpo_trainers.data.pair_records import CORRUPTED, Branch
from mmdpo_trainers.models.chat_format import render_prompt
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.token_rules import response_end

BLUR = Corruption(kind="blur", strength=0.5)
"""Draws nothing, so what is to come out is known."""


def processor_inputs(loaded: LoadedModel, prompt: str, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
    """What the processor gives for one prompt and its pictures, on the model's device."""
    family, processor = loaded.family, loaded.processor
    text = render_prompt(processor, prompt, loaded.date).replace(family.placeholder(processor), family.processor_text(processor))
    # The tokenizer's own opening as text: left to itself it may put an end behind the prompt, where the answer goes.
    text = loaded.texts.opening(text) + text
    encoded = family.processed(processor, text, pictures)
    tensors = {name: value for name, value in encoded.items() if isinstance(value, Tensor)}
    return {
        name: value.to(loaded.device, loaded.dtype if value.is_floating_point() else value.dtype)
        for name, value in tensors.items()
    }


@torch.no_grad()
def branch_logp(loaded: LoadedModel, record: dict[str, Any], branch: Branch) -> Tensor:
    """Summed log-probability of a branch's response, from the model's logits of that one sequence."""
    pictures = record["images" if branch.view == CORRUPTED else branch.view]
    if branch.view == CORRUPTED:
        pictures = [
            corrupt(picture, BLUR, "") if place == record["target"] else picture for place, picture in enumerate(pictures)
        ]
    response = loaded.texts.answer(record["id"], branch.response, record[branch.response][0]["content"])
    end = response_end(loaded.processor, loaded.model.generation_config)
    ids = torch.tensor([[*response, end]], device=loaded.device)
    inputs = processor_inputs(loaded, record["prompt"][0]["content"], pictures)
    start = inputs["input_ids"].shape[1]
    logits = loaded.model(**_continued(inputs, ids, answer_type=int(loaded.family.prefix)), use_cache=False).logits[
        0, start - 1 : -1
    ]
    return logits.double().log_softmax(-1).gather(1, ids[0, :, None]).sum()


def _continued(inputs: dict[str, Tensor], ids: Tensor, answer_type: int = 0) -> dict[str, Tensor]:
    """A processor's inputs of one prompt with text ids (1, R) of an answer behind it."""
    found, extra = dict(inputs), ids.shape[1]
    found["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    found["attention_mask"] = torch.ones_like(found["input_ids"])
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in found:
            found[name] = torch.nn.functional.pad(found[name], (0, extra), value=answer_type)
    if "cross_attention_mask" in found:
        # Text behind the last picture sees what the prompt's last token sees.
        last = found["cross_attention_mask"][:, -1:]
        found["cross_attention_mask"] = torch.cat([found["cross_attention_mask"], last.expand(-1, extra, -1, -1)], 1)
    return found
