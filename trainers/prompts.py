"""Prompt records as model inputs: the model's own chat format, its image tokens, padding, and answers behind the prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jinja2 import TemplateError
from PIL import Image

from mmdpo_trainers.data.pictures import PictureError, open_picture
from mmdpo_trainers.data.records import IMAGE_TOKEN
from mmdpo_trainers.errors import DataError, StageError
from mmdpo_trainers.families import EncodedPictures, family_of, image_token

if TYPE_CHECKING:
    from mmdpo_trainers.loading import LoadedModel

T = TypeVar("T")


def render_prompt(processor: Any, prompt: str) -> str:
    """One user turn and the opening of the answer, through the processor's chat template.

    `<image>` becomes the family's placeholder with the processor's own image token, in place. The prompt goes in as one text:
    templates that collect pictures in front of the text (LLaVA-1.5's does) would undo the interleaving
    "Image1:<image>\\nImage2:<image>" that questions refer to.
    Without a chat template: ``USER: {prompt} ASSISTANT:``.

    Raises StageError where the template changes the prompt or the number of pictures in it.
    """
    token = image_token(processor)
    prompt = prompt.replace(IMAGE_TOKEN, family_of(processor).placeholder(processor))
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if template is None:
        return f"USER: {prompt} ASSISTANT:"
    for content in ([{"type": "text", "text": prompt}], prompt):
        try:
            text = processor.apply_chat_template(
                [{"role": "user", "content": content}], chat_template=template, add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, TypeError, KeyError, ValueError):
            continue
        # Templates may trim a turn.
        if prompt.strip() in text and text.count(token) == prompt.count(token):
            return str(text)
    raise StageError(
        f"the chat template of {type(processor).__name__} does not keep the text of a user turn ({prompt[:60]!r}); "
        "give the model folder a chat_template.jinja that does"
    )


@dataclass
class EncodedPrompts:
    """Model inputs of a batch.

    inputs: `input_ids` and `attention_mask` (B, S) int64; where there is a picture, what `EncodedPictures.inputs` has, and for
    models with positions on three axes `mm_token_type_ids` (B, S) int32, 1 at image tokens.
    tokens_per_image: per row, the image tokens of each of its pictures, in reading order.
    patch_grids: per row, (rows, columns) of the image tokens of each of its pictures.
    response_spans: per row, the half-open columns [start, stop) of its answer; empty spans without answers.
    """

    inputs: dict[str, torch.Tensor]
    tokens_per_image: list[list[int]]
    patch_grids: list[list[tuple[int, int]]]
    response_spans: list[tuple[int, int]] = field(default_factory=list)


def encode_prompts(
    loaded: LoadedModel,
    records: Sequence[Mapping[str, Any]],
    *,
    padding_side: str,
    answers: Sequence[str | Sequence[int]] | None = None,
    pictures: Sequence[Sequence[Image.Image]] | None = None,
) -> EncodedPrompts:
    """Tokenise prompt records, with their pictures and optionally an answer each, into one padded batch on the model's device.

    records: `id`, `prompt` and `images` (paths or Pillow pictures; `pictures` replaces them). padding_side: `left` or `right`.
    answers: text, or token ids to teacher-force exactly. The tokens of prompt and answer are those of each on its own,
    put together, so a response's ids continue the prompt just as generation had them.

    Raises DataError, naming the record, where the placeholders of a prompt do not match its pictures, or an answer has one.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side: expected 'left' or 'right', got {padding_side!r}")
    if pictures is None:
        pictures = [load_pictures(record) for record in records]
    for record, its_pictures in zip(records, pictures, strict=True):
        _check_placeholders(record, len(its_pictures))
    encoded = _encode_pictures(loaded, pictures)
    tokens = _by_row(pictures, () if encoded is None else encoded.tokens)
    prompt_ids = _tokenize(loaded, records, tokens)
    answer_ids = [_answer_ids(loaded, *both) for both in zip(records, answers or [()] * len(records), strict=True)]
    rows = [prompt + answer for prompt, answer in zip(prompt_ids, answer_ids, strict=True)]
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), loaded.pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    spans = []
    for index, row in enumerate(rows):
        start = width - len(row) if padding_side == "left" else 0
        input_ids[index, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
        attention_mask[index, start : start + len(row)] = 1
        spans.append((start + len(prompt_ids[index]), start + len(row)))
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if encoded is not None:
        inputs |= encoded.inputs
        if encoded.grids is not None:
            inputs["mm_token_type_ids"] = (input_ids == loaded.image_token_id).int()
    placed = {
        name: value.to(loaded.device, loaded.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
    patch_grids = _by_row(pictures, () if encoded is None else encoded.patch_grids)
    return EncodedPrompts(placed, tokens, patch_grids, spans)


def load_pictures(record: Mapping[str, Any]) -> list[Image.Image]:
    """A record's pictures as upright RGB. Raises DataError naming the record where one cannot be read."""
    try:
        return [image if isinstance(image, Image.Image) else open_picture(image) for image in record["images"]]
    except PictureError as error:
        raise DataError(f"record {record['id']}: {error}; run augment again, or mend the path in the prompts") from error


def _check_placeholders(record: Mapping[str, Any], pictures: int) -> None:
    places = record["prompt"].count(IMAGE_TOKEN)
    if places != pictures:
        raise DataError(
            f"record {record['id']}: the prompt has {places} {IMAGE_TOKEN} placeholders for {pictures} pictures; "
            "each picture needs exactly one"
        )


def _encode_pictures(loaded: LoadedModel, pictures: Sequence[Sequence[Image.Image]]) -> EncodedPictures | None:
    flat = [picture for row in pictures for picture in row]
    return loaded.family.encode_pictures(loaded.processor, flat) if flat else None


def _by_row(pictures: Sequence[Sequence[Image.Image]], values: Iterable[T]) -> list[list[T]]:
    """One value a picture, in reading order, as a list for each row of pictures."""
    each = iter(values)
    return [[next(each) for _ in row] for row in pictures]


def _tokenize(
    loaded: LoadedModel, records: Sequence[Mapping[str, Any]], tokens_per_image: Sequence[Sequence[int]]
) -> list[list[int]]:
    bos = loaded.tokenizer.bos_token
    texts = [render_prompt(loaded.processor, record["prompt"]) for record in records]
    # A chat template that writes the opening token itself must not have it doubled.
    add_special_tokens = not (bos and all(text.startswith(bos) for text in texts))
    found = []
    for record, text, counts in zip(records, texts, tokens_per_image, strict=True):
        try:
            whole = loaded.family.expand(loaded.processor, text, counts)
        except ValueError as error:
            raise DataError(f"record {record['id']}: {error}; take the model's own image token out of the prompt") from error
        found.append(list(loaded.tokenizer(whole, add_special_tokens=add_special_tokens).input_ids))
    return found


def _answer_ids(loaded: LoadedModel, record: Mapping[str, Any], answer: str | Sequence[int]) -> list[int]:
    ids = list(loaded.tokenizer(answer, add_special_tokens=False).input_ids) if isinstance(answer, str) else list(answer)
    if loaded.image_token_id in ids:
        raise DataError(f"record {record['id']}: the answer holds the image token; only prompts have pictures")
    return ids
