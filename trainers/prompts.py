"""Prompt records as model inputs: the model's own chat format, its image tokens, padding, and answers behind the prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from PIL import Image

from mmdpo_trainers.data.pictures import PictureError, open_picture
from mmdpo_trainers.data.records import IMAGE_TOKEN
from mmdpo_trainers.errors import DataError, StageError

if TYPE_CHECKING:
    from mmdpo_trainers.loading import LoadedModel


def render_prompt(processor: Any, prompt: str) -> str:
    """One user turn and the opening of the answer, through the processor's chat template.

    `<image>` becomes the processor's own image token, in place. The prompt goes in as one text: templates that collect pictures
    in front of the text (LLaVA-1.5's does) would undo the interleaving "Image1:<image>\\nImage2:<image>" that questions refer to.
    Without a chat template: ``USER: {prompt} ASSISTANT:``.

    Raises StageError where the template changes the prompt or the number of pictures in it.
    """
    image_token = getattr(processor, "image_token", None) or IMAGE_TOKEN
    prompt = prompt.replace(IMAGE_TOKEN, image_token)
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
        if prompt.strip() in text and text.count(image_token) == prompt.count(image_token):
            return str(text)
    raise StageError(
        f"the chat template of {type(processor).__name__} does not keep the text of a user turn ({prompt[:60]!r}); "
        "give the model folder a chat_template.jinja that does"
    )


@dataclass
class EncodedPrompts:
    """Model inputs of a batch.

    inputs: `input_ids` and `attention_mask` (B, S) int64, `pixel_values` (pictures, 3, H, W) where there is a picture.
    tokens_per_image: per row, the image tokens of each of its pictures, in reading order.
    response_spans: per row, the half-open columns [start, stop) of its answer; empty spans without answers.
    """

    inputs: dict[str, torch.Tensor]
    tokens_per_image: list[list[int]]
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
    prompt_ids, pixel_values = _tokenize(loaded, [record["prompt"] for record in records], pictures)
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
    inputs = {"input_ids": input_ids.to(loaded.device), "attention_mask": attention_mask.to(loaded.device)}
    if pixel_values is not None:
        inputs["pixel_values"] = pixel_values.to(loaded.device, loaded.dtype)
    return EncodedPrompts(inputs, _tokens_per_image(loaded, prompt_ids, pictures), spans)


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


def _tokenize(
    loaded: LoadedModel, prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]
) -> tuple[list[list[int]], torch.Tensor | None]:
    texts = [render_prompt(loaded.processor, prompt) for prompt in prompts]
    flat = [picture for row in pictures for picture in row]
    bos = loaded.tokenizer.bos_token
    options = {"add_special_tokens": not (bos and all(text.startswith(bos) for text in texts))}
    encoded = loaded.processor(
        text=texts, images=flat or None, padding=True, padding_side="right", return_tensors="pt", **options
    )
    lengths = encoded["attention_mask"].sum(dim=1).tolist()
    ids = [row[:length] for row, length in zip(encoded["input_ids"].tolist(), lengths, strict=True)]
    return ids, encoded.get("pixel_values")


def _answer_ids(loaded: LoadedModel, record: Mapping[str, Any], answer: str | Sequence[int]) -> list[int]:
    ids = list(loaded.tokenizer(answer, add_special_tokens=False).input_ids) if isinstance(answer, str) else list(answer)
    if loaded.image_token_id in ids:
        raise DataError(f"record {record['id']}: the answer holds the image token; only prompts have pictures")
    return ids


def _tokens_per_image(
    loaded: LoadedModel, prompt_ids: Sequence[Sequence[int]], pictures: Sequence[Sequence[Image.Image]]
) -> list[list[int]]:
    rows, columns = loaded.patch_grid
    counts = [[rows * columns] * len(row) for row in pictures]
    for ids, row in zip(prompt_ids, counts, strict=True):
        found = sum(token == loaded.image_token_id for token in ids)
        if found != sum(row):
            raise StageError(
                f"model {loaded.path}: its processor gave {found} image tokens for {len(row)} pictures of {rows}x{columns} "
                "patches; processor and model do not belong together"
            )
    return counts
