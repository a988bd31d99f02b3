"""Prompt records as model inputs: their tokens with those of their pictures, padding, and answers behind the prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from PIL import Image

from mmdpo_trainers.data.content import UnreadContent
from mmdpo_trainers.data.conversation import Conversation, conversation_of
from mmdpo_trainers.data.images import ImageError, is_made, open_image
from mmdpo_trainers.data.records import check_placeholders
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.models.families import EncodedImages, View, expand_ids, plain_grid

if TYPE_CHECKING:
    from mmdpo_trainers.models.loaded import LoadedModel

T = TypeVar("T")


@dataclass
class EncodedPrompts:
    """Model inputs of a batch.

    inputs: `input_ids` and `attention_mask` (B, S) int64; where there is a picture, what `Family.model_inputs` has.
    tokens_per_image: per row, the image tokens of each of its pictures, in reading order; keys, where pictures are cross-attended.
    views: per row, what the image tokens of each of its pictures show.
    response_spans: per row, the half-open columns [start, stop) of its answer; empty spans without answers.
    cross_segments: (B, K) int32, where pictures are cross-attended: which of its row's pictures a key is of, -1 = none. Else None.
    """

    inputs: dict[str, torch.Tensor]
    tokens_per_image: list[list[int]]
    views: list[list[tuple[View, ...]]]
    response_spans: list[tuple[int, int]] = field(default_factory=list)
    cross_segments: torch.Tensor | None = None

    @property
    def patch_grids(self) -> list[list[tuple[int, int] | None]]:
        """Per row, (rows, columns) of the image tokens of each of its pictures; None where they are not just one grid."""
        return [[plain_grid(views) for views in row] for row in self.views]


def encode_prompts(
    loaded: LoadedModel,
    records: Sequence[Mapping[str, Any]],
    *,
    padding_side: str,
    answers: Sequence[str | Sequence[int]] | None = None,
    pictures: Sequence[Sequence[Image.Image]] | None = None,
) -> EncodedPrompts:
    """Tokenise prompt records, with their pictures and optionally an answer each, into one padded batch on the model's device.

    records: `id`, `prompt` (text or messages; beside it `tools`, `chat_template_kwargs`) and `images` (paths, recipes or Pillow pictures;
    `pictures` replaces them). padding_side: `left` or `right`.
    answers: text, or token ids to teacher-force exactly. The tokens of prompt and answer are those of each on its own
    (`TextEncoder`), put together, so a response's ids continue the prompt just as generation had them.

    Raises DataError, naming the record, where the placeholders of a prompt do not match its pictures, an answer has one, or a text
    holds tokens of the chat format.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side: expected 'left' or 'right', got {padding_side!r}")
    if pictures is None:
        pictures = [load_images(record) for record in records]
    for record, its_images in zip(records, pictures, strict=True):
        check_placeholders(record["id"], _conversation(record).pictures, len(its_images))
    encoded = _encode_images(loaded, records, pictures)
    prompts = prompt_ids(loaded, records, _by_row(pictures, () if encoded is None else encoded.blocks))
    answer_ids = [_answer_ids(loaded, *both) for both in zip(records, answers or [()] * len(records), strict=True)]
    rows = [prompt + answer for prompt, answer in zip(prompts, answer_ids, strict=True)]
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), loaded.pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    spans = []
    for index, row in enumerate(rows):
        start = width - len(row) if padding_side == "left" else 0
        input_ids[index, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
        attention_mask[index, start : start + len(row)] = 1
        spans.append((start + len(prompts[index]), start + len(row)))
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    family, cross_segments = loaded.family, None
    tokens: list[list[int]] = [[] for _ in pictures]
    if encoded is not None:
        numbers = _by_row(pictures, range(len(encoded.tokens)))
        inputs |= family.model_inputs(encoded, numbers, input_ids)
        tokens = _by_row(pictures, family.keys(encoded))
        cross_segments = family.cross_segments(encoded, numbers)
    column = torch.arange(width)
    inputs |= family.answer_types(torch.stack([(column >= start) & (column < stop) for start, stop in spans]))
    placed = {
        name: value.to(loaded.device, loaded.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
    views = _by_row(pictures, () if encoded is None else encoded.views)
    return EncodedPrompts(placed, tokens, views, spans, None if cross_segments is None else cross_segments.to(loaded.device))


def in_forwards(loaded: LoadedModel, records: Sequence[Mapping[str, Any]], work: Callable[[list[int]], Sequence[T]]) -> list[T]:
    """`work` on the indices of records that may share a forward, its results in the records' order.

    Where pictures are cross-attended, a token before the first of them sees all there is, the padding for a neighbour's pictures
    included: only records with as many pictures may share one.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        groups[len(record["images"]) if loaded.family.cross_attention else 0].append(index)
    found = {index: result for group in groups.values() for index, result in zip(group, work(group), strict=True)}
    return [found[index] for index in range(len(records))]


def load_images(record: Mapping[str, Any]) -> list[Image.Image]:
    """A record's pictures, upright and in RGB. Raises DataError naming the record where one cannot be read."""
    found = []
    for image in record["images"]:
        try:
            found.append(open_image(image))
        except ImageError as error:
            remedy = "run augment again" if is_made(image) else "restore the file"
            # A file that was changed has a remedy of its own.
            told = error if error.reason == "changed" else f"{error}; {remedy}, or mend the path in the prompts"
            raise DataError(f"record {record['id']}: {told}") from error
    return found


def _encode_images(
    loaded: LoadedModel, records: Sequence[Mapping[str, Any]], pictures: Sequence[Sequence[Image.Image]]
) -> EncodedImages | None:
    flat = [picture for row in pictures for picture in row]
    alone = [len(row) == 1 for row in pictures for _ in row]
    try:
        return loaded.family.encode_images(loaded.processor, flat, alone) if flat else None
    except ValueError:
        refuse_images(loaded, records, pictures)
        raise


def refuse_images(loaded: LoadedModel, records: Sequence[Mapping[str, Any]], pictures: Sequence[Sequence[Image.Image]]) -> None:
    """Raise DataError for the first record with a picture that the image processor refuses; there may be none."""
    for record, row in zip(records, pictures, strict=True):
        try:
            for picture in row:
                loaded.family.encode_images(loaded.processor, [picture], [len(row) == 1])
        except ValueError as error:
            raise DataError(
                f"record {record['id']}: the image processor refuses a picture: {error}; take the record out of the prompts, or the picture out "
                "of the data, and start again"
            ) from error


def _by_row(pictures: Sequence[Sequence[Image.Image]], values: Iterable[T]) -> list[list[T]]:
    """One value a picture, in reading order, as a list for each row of pictures."""
    each = iter(values)
    return [[next(each) for _ in row] for row in pictures]


def prompt_ids(
    loaded: LoadedModel, records: Sequence[Mapping[str, Any]], blocks: Sequence[Sequence[Sequence[int]]]
) -> list[list[int]]:
    """Token ids of the prompts, `blocks` in the places of their pictures."""
    return [
        expand_ids(
            loaded.texts.prompt(record["id"], _conversation(record), len(its_blocks)),
            loaded.image_token_id,
            loaded.family.blocks_of_prompt(loaded.processor, its_blocks),
        )
        for record, its_blocks in zip(records, blocks, strict=True)
    ]


def _conversation(record: Mapping[str, Any]) -> Conversation:
    try:
        return conversation_of(record)
    except UnreadContent as error:
        raise DataError(f"record {record['id']}: {error}") from error


def _answer_ids(loaded: LoadedModel, record: Mapping[str, Any], answer: str | Sequence[int]) -> list[int]:
    if isinstance(answer, str):
        return loaded.texts.answer(record["id"], "the answer", answer)
    loaded.texts.check_answer_ids(record["id"], "the answer", answer)
    return list(answer)
