"""Families that have no declaration: what transformers' conventions say about a model and its processor, or what is missing."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import json
import re
import sys
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from mmdpo_kernels.decoder_layers import calls_interface
from mmdpo_kernels.patch import images_see_themselves
from mmdpo_trainers.models.families.family import Family
from mmdpo_trainers.models.families.images import EncodedImages

_PROJECTOR = re.compile(r"proj|merger|connector|adapter|resampler|newline")
"""Names of what lies between a vision tower and a language model."""


CHECKED: tuple[str, ...] = (
    *("aria", "cohere2_vision", "exaone4_5", "kimi_k25", "lfm2_vl", "lfm3_vl", "lighton_ocr", "llava_next_video"),
    *("muse_glimmer", "step3p7", "video_llama_3", "video_llava", "vipllava"),
)
"""Families without a declaration that went through `mmdpo check` on a tiny checkpoint."""

OTHER_IN_VLLM = dict.fromkeys(("cohere2_vision", "exaone4_5"), "other tokens: none of eight greedy answers was the same")
"""Their `Family.other_in_vllm`."""


class Conventional(Family):
    """A family of its own name: `get_image_features`, `get_decoder`, `config.image_token_id`, a processor that expands an image token.

    Everything below the base model but the decoder and its embedding is vision tower or, by its name, projector. Positions count tokens.
    """

    is_declared = False

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.name = getattr(config, "model_type", "unknown")  # type: ignore[misc]
        self.other_in_vllm = OTHER_IN_VLLM.get(self.name)
        if config is None:
            return
        missing = self._missing()
        if missing:
            raise ValueError(
                f"model: family {self.name!r} has no declaration and does not follow the conventions: {'; '.join(missing)}"
            )

    @property
    def unchecked(self) -> str | None:
        """What to say of a family that nobody has checked; None: somebody has."""
        if self.name in CHECKED:
            return None
        return (
            f"family {self.name!r} is used by transformers' conventions and was never checked; run `mmdpo check` on the model before its "
            "numbers are believed"
        )

    @functools.cached_property
    def projector(self) -> tuple[str, ...]:  # type: ignore[override]
        """Parts whose names say so."""
        return tuple(name for name in self._parts if _PROJECTOR.search(name))

    @functools.cached_property
    def vision(self) -> tuple[str, ...]:  # type: ignore[override]
        """All other parts."""
        return tuple(name for name in self._parts if name not in self.projector)

    @property
    def _parts(self) -> tuple[str, ...]:
        return _parts(self._body_class, type(self.config), self.config.to_json_string(use_diff=False))  # type: ignore[arg-type]

    @property
    def model_class(self) -> Any:
        return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(self.config)]

    @property
    def _body_class(self) -> Any:
        """The class of the model without its head, by transformers' naming."""
        name = self.model_class.__name__.replace("ForConditionalGeneration", "Model")
        return getattr(sys.modules[self.model_class.__module__], name, None)

    def _missing(self) -> list[str]:
        """What a convention asks for and the model does not have."""
        if type(self.config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return ["transformers has no class for images and text with a head for it (AutoModelForImageTextToText)"]
        found, body = [], self._body_class
        if not isinstance(getattr(self.config, "image_token_id", None), int):
            found.append("its configuration has no image_token_id, the token that stands for one image feature")
        if not hasattr(body, "get_image_features"):
            found.append("its base model has no get_image_features")
        elif hasattr(body, "get_rope_index"):
            found.append("its positions follow pictures (get_rope_index), which needs a declaration such as Qwen2VL's")
        elif images_see_themselves(body):
            found.append("its mask tells pictures from text (token types), which needs a declaration such as Gemma3's")
        if not (getattr(self.model_class, "_supports_attention_backend", False) or self._calls_interface()):
            found.append("its attention does not go through transformers' attention interface (_supports_attention_backend)")
        return found

    def _calls_interface(self) -> bool:
        """Whether the decoder's layers call the attention interface, though their class does not say so."""
        with torch.device("meta"):
            decoder = self.model_class(copy.deepcopy(self.config)).get_decoder()
        return calls_interface(decoder)

    def features(self, body: Any, pictures: EncodedImages) -> list[Tensor]:
        # What else a processor returns, it returns for itself.
        named = inspect.signature(inspect.unwrap(body.get_image_features)).parameters
        inputs = {name: value for name, value in pictures.inputs.items() if name in named}
        return super().features(body, dataclasses.replace(pictures, inputs=inputs))

    def split(self, output: Any, pictures: EncodedImages) -> list[Tensor]:
        if getattr(output, "deepstack_features", None) is not None:
            raise ValueError(f"family {self.name!r} has features for several layers, which needs a declaration such as Qwen3VL's")
        return super().split(output, pictures)

    def placeholder(self, processor: Any) -> str:
        template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        return _placeholder(processor, self.image_token(processor), template) if template else self.image_token(processor)


@functools.lru_cache(maxsize=16)
def _parts(body_class: Any, config_class: Any, config: str) -> tuple[str, ...]:
    """Names of the children and parameters of a base model besides its decoder."""
    with torch.device("meta"):
        body = body_class(config_class.from_dict(json.loads(config)))
    decoder = body.get_decoder()
    children = [name for name, child in body.named_children() if child is not decoder]
    return (*children, *(name for name, _ in body.named_parameters(recurse=False)))


@functools.lru_cache(maxsize=4)
def _placeholder(processor: Any, token: str, template: str) -> str:
    """What a chat template writes for a picture between two texts, without spaces around it; else the image token alone."""
    content = [{"type": "text", "text": "<<before"}, {"type": "image"}, {"type": "text", "text": "behind>>"}]
    try:
        text = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=template, tokenize=False
        )
    except Exception:  # noqa: BLE001 - templates raise what they like; a prompt is checked when it is rendered
        return token
    found = re.search("<<before(.*?)behind>>", text, flags=re.DOTALL)
    between = found[1].strip() if found else ""
    return between if between.count(token) == 1 else token
