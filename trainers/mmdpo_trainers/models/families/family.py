"""`Family`: what all model families share, by transformers' conventions. A declaration says where one differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from mmdpo_trainers.data.records import IMAGE_TOKEN
from mmdpo_trainers.models.families.images import EncodedImages, View

_OF_TEXT = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask", "labels"})
"""What a processor returns for the text."""


_CARRYING = frozenset({"linear_attention", "conv", "mamba", "recurrent"})
"""Kinds of layers, in a configuration's `layer_types`, that carry a state along and attend to nothing."""

_BY_KEYS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds in which a token reaches others as a key of attention only."""


class Family:
    """A model family; `family_of` finds a model's. It holds no weights, so it may travel to another process.

    config: the model's configuration; only what looks at the model needs it.
    """

    name: ClassVar[str]
    """`model_type` in config.json."""
    model_name: ClassVar[str]
    processor_name: ClassVar[str]
    vision: tuple[str, ...]
    """The vision tower: modules or parameters, by their names below the base model."""
    projector: tuple[str, ...]
    """What brings features of the vision tower to the language model; it may lie inside the tower."""
    is_declared: ClassVar[bool] = True
    """Whether it has a declaration of its own."""
    token_types: ClassVar[str | None] = None
    """The model's argument (B, S) that tells image tokens, 1, from text, 0; None: it has none."""
    several_differ: ClassVar[bool] = False
    """Whether a picture that has others beside it in its prompt is encoded otherwise than alone."""
    processor_counts: ClassVar[bool] = False
    """Whether the processor's own count of a size's tokens is that of all that stand for the picture."""
    official_regions: ClassVar[bool] = False
    """Whether the rectangles of MIA-DPO's released code are cut out of this family's patches."""
    divides_logits: ClassVar[bool] = True
    """Whether the text configuration's `logits_scaling`, where there is one, divides the logits, or multiplies them."""
    cross_attention: ClassVar[bool] = False
    """Whether pictures come in by cross-attention layers, and not in the places of image tokens."""
    prefix: ClassVar[bool] = False
    """Whether all tokens of a prompt see each other both ways; token types are then 0 for a prompt and 1 for an answer."""
    first_position: ClassVar[int] = 0
    """Position of a sequence's first token."""
    other_in_vllm: str | None = None
    """What vLLM answers otherwise than transformers, measured, for which it is refused; None: nothing that is known."""
    own_prompts: ClassVar[bool] = False
    """Whether prompts without a chat template are made as the processor makes them itself."""

    def __init__(self, config: Any = None) -> None:
        self.config = config

    @property
    def known_config(self) -> Any:
        """The model's configuration. ValueError where the family was found from a processor alone."""
        if self.config is None:
            raise ValueError(f"family {self.name}: the model's configuration is needed; make it with family_of(model)")
        return self.config

    @property
    def model_class(self) -> Any:
        """The transformers class with the language-model head."""
        return getattr(transformers, self.model_name)

    @classmethod
    def fixed_grid(cls, config: Mapping[str, Any]) -> tuple[int, int] | None:
        """Patch rows and columns that every picture has, by the values of config.json; None where pictures have grids of their own.

        Raises KeyError, TypeError or ValueError where config.json does not say.
        """
        return None

    def image_token(self, processor: Any) -> str:
        """The text of the image token, which stands for one image feature."""
        return str(getattr(processor, "image_token", None) or IMAGE_TOKEN)

    def image_token_id(self, processor: Any) -> int:
        """Its id in the processor's vocabulary."""
        return int(processor.tokenizer.convert_tokens_to_ids(self.image_token(processor)))

    def placeholder(self, processor: Any) -> str:
        """What one `<image>` of a prompt becomes: text that holds one image token."""
        return self.image_token(processor)

    def plain_prompt(self, processor: Any, prompt: str) -> str:
        """What a prompt becomes where there is no chat template."""
        return f"USER: {prompt} ASSISTANT:".replace(IMAGE_TOKEN, self.placeholder(processor))

    def processed(self, processor: Any, text: str, pictures: Sequence[Image.Image]) -> Mapping[str, Any]:
        """What the processor itself gives for one rendered prompt, its pictures as `processor_text`."""
        images = [list(pictures)] if pictures else None
        return processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)  # type: ignore[no-any-return]

    def processor_text(self, processor: Any) -> str:
        """What the processor itself takes for one picture in a text."""
        return self.placeholder(processor)

    def encode_images(
        self, processor: Any, pictures: Sequence[Image.Image], alone: Sequence[bool] | None = None
    ) -> EncodedImages:
        """One or more RGB pictures through the processor, each as if it were the only one of a prompt.

        alone: per picture whether it is; only where `several_differ`. Raises ValueError for a picture that the processor refuses, or a
        processor whose text for a picture is not what `placeholder` says.
        """
        texts = [self.processor_text(processor)] * len(pictures)
        encoded = processor(text=texts, images=[[picture] for picture in pictures], padding=True, return_tensors="pt")
        rows = zip(encoded["input_ids"], encoded["attention_mask"].bool(), strict=True)
        blocks = [self._block(processor, row[kept].tolist()) for row, kept in rows]
        image = self.image_token_id(processor)
        inputs = {name: value for name, value in encoded.items() if isinstance(value, Tensor) and name not in _OF_TEXT}
        tokens = [block.count(image) for block in blocks]
        sizes = [picture.size for picture in pictures]
        views = [self.views(processor, inputs, index, size, blocks[index]) for index, size in enumerate(sizes)]
        known = [found if sum(view.tokens for view in found) == count else () for found, count in zip(views, tokens, strict=True)]
        return EncodedImages(inputs=inputs, tokens=tokens, blocks=blocks, views=known, grids=inputs.get("image_grid_thw"))

    def blocks_of_prompt(self, processor: Any, blocks: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """The `EncodedImages.blocks` of one prompt's pictures, in its order, as they are in this prompt."""
        return list(blocks)

    def views(
        self, processor: Any, inputs: dict[str, Tensor], index: int, size: tuple[int, int], block: list[int]
    ) -> tuple[View, ...]:
        """What the image tokens of the `index`-th picture, of `size` (width, height), show; empty where that is not known."""
        return ()

    def _block(self, processor: Any, row: list[int]) -> list[int]:
        """The token ids in the place of the placeholder's image token, from those of a processed text of one picture."""
        plain = list(processor.tokenizer(self.placeholder(processor)).input_ids)
        place = plain.index(self.image_token_id(processor))
        before, after = plain[:place], plain[place + 1 :]
        stop = len(row) - len(after)
        if row[:place] != before or row[stop:] != after or stop <= place:
            raise ValueError(
                f"{type(processor).__name__} puts {processor.tokenizer.decode(row)[:80]!r} in the place of a picture, which does not begin "
                f"and end as {self.placeholder(processor)!r}"
            )
        return row[place:stop]

    def crops_centre(self, processor: Any) -> bool:
        """Whether of an oblong picture only the centred square is seen."""
        return False

    def image_tokens(self, processor: Any, size: tuple[int, int], alone: bool = True) -> int:
        """Tokens that stand in the place of the one image token of a picture of `size` (width, height)."""
        if self.processor_counts:
            return int(processor._get_num_multimodal_tokens(image_sizes=[size[::-1]])["num_image_tokens"][0])
        return len(self.encode_images(processor, [Image.new("RGB", size, (255, 255, 255))], [alone]).blocks[0])

    def model_inputs(self, pictures: EncodedImages, rows: Sequence[Sequence[int]], input_ids: Tensor) -> dict[str, Tensor]:
        """The model's keyword arguments for a batch of token ids (B, S), besides these.

        rows: per row the indices of its pictures, which are `pictures` in this very order.
        """
        types = {} if self.token_types is None else {self.token_types: (input_ids == self.known_config.image_token_id).int()}
        return {**pictures.inputs, **types}

    def answer_types(self, answers: Tensor) -> dict[str, Tensor]:
        """The model's keyword arguments that tell answers (B, S) bool from prompts; empty where it needs none."""
        return {self.token_types: answers.int()} if self.prefix and self.token_types else {}

    def blocks(self, is_image: np.ndarray, prompt: int) -> np.ndarray | None:
        """(L,) int64: of a sequence, which block of tokens that see each other both ways each token is in, -1 = none, as
        `TokenTree.from_sequences` takes them; None: the model's masks are causal, and it asks for no token types to make them by.

        is_image: (L,) bool, its image tokens. prompt: how many leading tokens are prompt. Raises ValueError for a block that a packed tree
        cannot have.
        """
        return None

    @property
    def tree_refusal(self) -> str | None:
        """Why packed token trees are not exact, where the model's layers alone do not tell; None: they are."""
        return None

    def keys(self, pictures: EncodedImages) -> list[int]:
        """(P) keys that each picture is to a query: its image tokens, or what cross-attention layers make of it."""
        return pictures.tokens

    def cross_segments(self, pictures: EncodedImages, rows: Sequence[Sequence[int]]) -> Tensor | None:
        """(B, K) int32, where pictures are cross-attended: which of its row's pictures a key of `model_inputs` is of, -1 = none."""
        return None

    def features(self, body: nn.Module, pictures: EncodedImages) -> list[Tensor]:
        """Per picture (tokens, F): what its image tokens stand for. body: the base model."""
        output = body.get_image_features(**pictures.inputs, return_dict=True)  # type: ignore[operator]
        return self.split(output, pictures)

    def split(self, output: Any, pictures: EncodedImages) -> list[Tensor]:
        """A vision tower's output picture by picture. ValueError where it is not one feature an image token."""
        found = output.pooler_output
        if found is None:
            raise ValueError("its vision tower gives no features of pictures by themselves (pooler_output)")
        flat = torch.cat([each.flatten(0, -2) for each in found]) if isinstance(found, list | tuple) else found.flatten(0, -2)
        if len(flat) != sum(pictures.tokens):
            raise ValueError(
                f"processor and model do not belong together: the processor gives {sum(pictures.tokens)} image tokens, the model "
                f"{len(flat)} features"
            )
        return list(flat.split(pictures.tokens))

    def hidden_states(self, body: Any, input_ids: Tensor, features: list[Tensor], feature_rows: Tensor, **inputs: Any) -> Tensor:
        """(B, S, H) last hidden states of a batch whose pictures are known by their features.

        features: as `features` gives them. feature_rows: (K) for each image token of `input_ids`, in reading order, its row among all
        features: a tree may hold a part of a picture. inputs: the decoder's other arguments.
        """
        if features:
            inputs["inputs_embeds"] = self.embeds(body, input_ids, torch.cat(features)[feature_rows])
        else:
            inputs["input_ids"] = input_ids
        if self.token_types is not None:
            inputs.setdefault(self.token_types, (input_ids == self.known_config.image_token_id).int())
        return body(**inputs).last_hidden_state  # type: ignore[no-any-return]

    def embeds(self, body: Any, input_ids: Tensor, placed: Tensor) -> Tensor:
        """(B, S, H) token embeddings with the features `placed` (K, H) in the places of image tokens."""
        is_image = input_ids == self.known_config.image_token_id
        # Its id may lie behind the embedding's last row.
        embeds = body.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        return embeds.masked_scatter(is_image[..., None].expand_as(embeds), placed.to(embeds))  # type: ignore[no-any-return]

    def position_ids(self, input_ids: Tensor, grids: Tensor | None, attention_mask: Tensor | None = None) -> Tensor | None:
        """(3, B, S) int64 positions of rows of token ids (B, S), their pictures' `grids` (P, 3) in reading order; None where
        the model counts tokens itself, one by one."""
        return None


def image_layers(config: Any) -> Sequence[int]:
    """Decoder layers that see pictures, 0-based: all that attend, or those of cross-attention where pictures come in by these."""
    text = config.get_text_config()
    kinds, count = getattr(text, "layer_types", None) or (), int(text.num_hidden_layers)
    attending = [layer for layer in range(count) if layer >= len(kinds) or kinds[layer] not in _CARRYING]
    return list(getattr(text, "cross_attention_layers", None) or ()) or (range(count) if len(attending) == count else attending)


def hiding_refusal(family: Family, config: Any) -> str | None:
    """Why image tokens cannot be hidden from a model of this configuration, or None where they can. config: None where it is not known."""
    if family.cross_attention:
        return "its pictures come in by cross-attention, not as image tokens"
    if config is None:
        return None
    kinds = [kind for kind in getattr(config.get_text_config(), "layer_types", None) or () if kind not in _BY_KEYS]
    return f"its layers of {kinds[0]} carry every token on, whatever is masked" if kinds else None


def expand_ids(ids: Sequence[int], image_token_id: int, blocks: Sequence[Sequence[int]]) -> list[int]:
    """Token ids with their k-th image token replaced by `blocks[k]`. ValueError where their numbers differ."""
    found = list(ids).count(image_token_id)
    if found != len(blocks):
        raise ValueError(f"text: expected {len(blocks)} image tokens, one a picture, got {found}")
    each = iter(blocks)
    return [token for place in ids for token in (next(each) if place == image_token_id else (place,))]
