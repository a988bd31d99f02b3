"""Preference records to tokenised examples: a record's branches as token sequences, each a response behind the prompt with a view's images."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdpo_trainers.data.conversation import Conversation
from mmdpo_trainers.data.corruption import Corruption, Model
from mmdpo_trainers.data.looks import learn_digests
from mmdpo_trainers.data.pair_records import (
    BRANCHES,
    CORRUPTED,
    IMAGES,
    PAIR,
    Branch,
    check_content,
    record_image_digest,
    record_name,
    response_turn,
)
from mmdpo_trainers.data.records import IMAGE_TOKEN
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.models.families import EncodedImages, Family, expand_ids
from mmdpo_trainers.models.template_date import TemplateDate
from mmdpo_trainers.models.token_rules import TextEncoder
from mmdpo_trainers.training.batches.views import BatchImages, ViewPlan, Views, sha256


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """One branch of one record: P tokens of prompt, then R of response."""

    prompt: np.ndarray
    """(P,) int64."""
    response: np.ndarray
    """(R,) int64, the end token included."""
    feature_rows: np.ndarray
    """(P,) int64: for an image token its row among the features of all the batch's pictures, one after the other; -1 for text."""
    unseen: np.ndarray | None
    """(P,) bool: image tokens that no token sees; None: none."""
    positions: Tensor | None
    """(3, P + R) int64, or None where positions count tokens."""
    weights: np.ndarray | None
    """(R,) float64: weight of each response token, or None where all are alike."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A record's token sequences, one a branch."""

    record: Mapping[str, Any]
    key: str
    sequences: tuple[TokenSequence, ...]
    pictures: list[int]
    """Its pictures' indices among the batch's distinct ones."""

    @property
    def name(self) -> str:
        """What messages call the record."""
        return record_name(self.record)


@dataclass(frozen=True)
class _Texts:
    """A record's tokens, one image token a picture."""

    record: Mapping[str, Any]
    conversation: Conversation
    prompt: list[int]
    responses: dict[str, list[int]]
    """By column."""
    images: list[Any]


class ExampleMaker:
    """See `PreferenceCollator`, whose arguments these are."""

    def __init__(
        self,
        processor: Any,
        *,
        family: Family,
        image_token_id: int,
        end_id: int,
        branches: Mapping[str, Branch],
        corruptions: Mapping[str, Corruption],
        no_image: bool,
        changed_token_weight: float,
        picture_pool: Sequence[Any],
        date: TemplateDate | None,
        prompt_of: Callable[[Mapping[str, Any]], Conversation],
    ) -> None:
        self.processor, self.family, self.prompt_of = processor, family, prompt_of
        self.image_token_id, self.end_id = image_token_id, end_id
        self.branches = dict(branches)
        shown = {branch.view for branch in branches.values()}
        self.corruptions = {view: corruption for view, corruption in corruptions.items() if view in shown}
        self.no_image = no_image
        self.changed_token_weight = changed_token_weight
        ends = {end_id, processor.tokenizer.eos_token_id} - {None}
        self._encoder = TextEncoder(processor, image_token_id=image_token_id, end_ids=ends, date=date)
        self._views = Views(
            [branch.view for branch in branches.values()],
            processor=processor,
            family=family,
            corruptions=self.corruptions,
            no_image=no_image,
            picture_pool=picture_pool,
        )
        self._columns = list(dict.fromkeys(branch.response for branch in branches.values()))
        self._settings = self._settings_digest()

    def examples(self, records: Sequence[Mapping[str, Any]], model: Model) -> tuple[list[Example], EncodedImages | None]:
        """The records as `model` (policy or reference) is to see them, and their distinct pictures."""
        images = BatchImages()
        drafts = []
        for record in records:
            texts = self._texts(record)
            drafts.append((texts, self._plan(texts, images.opened)))
        shown = [self._views.place(plan, images, model) for _, plan in drafts]
        encoded = images.encode(self.family, self.processor)
        return [self._example(*draft, each, encoded, model) for draft, each in zip(drafts, shown, strict=True)], encoded

    def length(self, record: Mapping[str, Any]) -> int:
        """Tokens of the record's longest branch. Of its pictures only the sizes are read."""
        texts = self._texts(record)
        counts = self._views.tokens(record, texts.images)
        return max(self._length(texts, counts, branch) for branch in self.branches.values())

    def tree_tokens(self, record: Mapping[str, Any]) -> int:
        """Tokens of a tree of this record alone. Of its pictures only the sizes are read.

        Kind "mask" may take fewer: image tokens before the first masked one are shared.
        """
        texts, branches = self._texts(record), list(self.branches.values())
        counts = self._views.tokens(record, texts.images)
        tokens = 0
        for number, branch in enumerate(branches):
            shared = [self._shared(texts, counts, branch, other) for other in branches[:number]]
            tokens += self._length(texts, counts, branch) - max(shared, default=0)
        return tokens

    def _length(self, texts: _Texts, counts: Mapping[str, list[int]], branch: Branch) -> int:
        """Tokens of a branch. counts: by view, those of its images."""
        images = counts[branch.view]
        return len(texts.prompt) + sum(images) - len(images) + len(texts.responses[branch.response])

    def _shared(self, texts: _Texts, counts: Mapping[str, list[int]], branch: Branch, other: Branch) -> int:
        """Leading tokens that two branches have in common, at least."""
        place = self._views.first_difference(texts.record, texts.images, branch.view, other.view)
        if place is None:
            common = _common(texts.responses[branch.response], texts.responses[other.response])
            return self._length(texts, counts, branch) - len(texts.responses[branch.response]) + common
        if self.family.prefix:
            return 0
        before = [index for index, token in enumerate(texts.prompt) if token == self.image_token_id][place]
        return before + sum(counts[IMAGES][:place]) - place

    def shared_tokens(self, records: Sequence[Mapping[str, Any]]) -> int:
        """See `PreferenceCollator.shared_tokens`."""
        texts = [self._texts(record) for record in records]
        first = texts[0].prompt
        common = min(_common(first, other.prompt) for other in texts)
        if self.family.prefix and any(len(other.prompt) != common for other in texts):
            return 0
        pictures = first[:common].count(self.image_token_id)
        return common + sum(self._views.counts(records[0], texts[0].images[:pictures])) - pictures

    def key(self, record: Mapping[str, Any]) -> str:
        """See `PreferenceCollator.key`."""
        texts = self._texts(record)
        return self._key(texts, self._plan(texts))

    def learn_keys(self, records: Sequence[Mapping[str, Any]]) -> None:
        """See `PreferenceCollator.learn_keys`."""
        learn_digests(image for record in records for image in self._views.images(record))

    def image_key(self, record: Mapping[str, Any]) -> str:
        """See `PreferenceCollator.image_key`."""
        images = self._views.images(record)
        if not images:
            return self.key(record)
        return sha256([record_image_digest(record, image) for image in images])

    def _texts(self, record: Mapping[str, Any]) -> _Texts:
        check_content(record)
        conversation, images = self.prompt_of(record), self._views.images(record)
        if self.no_image:
            conversation = conversation.map(_without_images)
        prompt = self._encoder.prompt(record_name(record), conversation, len(images))
        responses = {column: self._response(record, column, conversation) for column in self._columns}
        return _Texts(record, conversation, prompt, responses, images)

    def _response(self, record: Mapping[str, Any], column: str, conversation: Conversation) -> list[int]:
        ids = self._encoder.response(record_name(record), column, conversation, response_turn(record, column))
        if column == "chosen" and not ids:
            raise DataError(f"record {record_name(record)}: chosen is an end token alone; give it a text, or remove the record")
        return [*ids, self.end_id]

    def _plan(self, texts: _Texts, opened: dict[str, Image.Image] | None = None) -> ViewPlan:
        return self._views.plan(texts.record, texts.conversation.text, texts.images, opened)

    def _key(self, texts: _Texts, plan: ViewPlan) -> str:
        digests, substitutes, others = plan.content()
        responses = dict(texts.responses)
        content = [self._settings, texts.prompt, responses.pop("chosen"), responses.pop("rejected"), digests, substitutes]
        # Records without further branches have the keys that caches know.
        return sha256([*content, responses, others] if responses or others else content)

    def _settings_digest(self) -> str:
        """What all keys share: what a record's log-probabilities depend on besides the record and the model."""
        described = {view: dataclasses.asdict(corruption) for view, corruption in self.corruptions.items()}
        corruption = described.pop(CORRUPTED, None)
        further = {name: dataclasses.astuple(branch) for name, branch in self.branches.items() if name not in BRANCHES}
        return sha256(
            [
                *(
                    self.family.name,
                    self.processor.image_processor.to_json_string(),
                    self._processor_settings(),
                    list(self.branches),
                    corruption,
                ),
                *(self.no_image, self.changed_token_weight),
                *([further] if further else []),
                *([described] if described else []),
            ]
        )

    def _processor_settings(self) -> dict[str, Any]:
        """The processor's own settings: they say how many tokens a picture has, which a prompt with one for each does not."""
        plain = {name: value for name, value in vars(self.processor).items() if isinstance(value, int | float | str)}
        return {name: plain[name] for name in sorted(plain) if name != "chat_template"}

    def _example(
        self, texts: _Texts, plan: ViewPlan, shown: dict[str, list[int]], encoded: EncodedImages | None, model: Model
    ) -> Example:
        positions: dict[tuple[bytes, bytes | None], Tensor | None] = {}
        prompts = {view: self._prompt(texts.prompt, images, encoded, positions) for view, images in shown.items()}
        unseen = {
            view: self._views.unseen(plan, view, rows, shown[IMAGES], encoded, model) for view, (_, rows, _) in prompts.items()
        }
        responses = {column: np.array(ids) for column, ids in texts.responses.items()}
        weights = self._weights(texts.responses)
        return Example(
            record=texts.record,
            key=self._key(texts, plan),
            sequences=tuple(
                _sequence(*prompts[branch.view], unseen[branch.view], responses[branch.response], weights[branch.response])
                for branch in self.branches.values()
            ),
            pictures=shown[IMAGES],
        )

    def _weights(self, responses: Mapping[str, list[int]]) -> dict[str, np.ndarray | None]:
        """By column, of each response's tokens: what differs between chosen and rejected, and in others from the chosen response."""
        weight, chosen = self.changed_token_weight, responses["chosen"]
        found = dict(zip(PAIR, changed_token_weights(chosen, responses["rejected"], weight), strict=True))
        others = {column: ids for column, ids in responses.items() if column not in found}
        return found | {column: changed_token_weights(chosen, ids, weight)[1] for column, ids in others.items()}

    def _prompt(
        self,
        prompt: list[int],
        pictures: list[int],
        encoded: EncodedImages | None,
        positions: dict[tuple[bytes, bytes | None], Tensor | None],
    ) -> tuple[np.ndarray, np.ndarray, Tensor | None]:
        """The prompt with each picture's tokens in its place, the feature rows of its tokens, and its positions.

        positions: those known by token ids and grids; a corrupted picture's are those of the picture itself.
        """
        shown = [] if encoded is None else [encoded.blocks[picture] for picture in pictures]
        blocks = self.family.blocks_of_prompt(self.processor, shown)
        ids = np.array(expand_ids(prompt, self.image_token_id, blocks), dtype=np.int64)
        rows = np.full_like(ids, -1)
        if encoded is not None and pictures:
            starts = np.cumsum([0, *encoded.tokens])
            rows[ids == self.image_token_id] = np.concatenate([np.arange(starts[p], starts[p + 1]) for p in pictures])
        grids = None if encoded is None or encoded.grids is None else encoded.grids[pictures]
        shape = ids.tobytes(), None if grids is None else grids.numpy().tobytes()
        if shape not in positions:
            found = self.family.position_ids(torch.from_numpy(ids)[None], grids)
            positions[shape] = None if found is None else found[:, 0]
        return ids, rows, positions[shape]


def changed_token_weights(
    chosen: Sequence[int], rejected: Sequence[int], weight: float
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Per response token 1 where both responses have it in common, and `weight` where it was changed; None for a `weight` of 1.

    What is in common is Ratcliff and Obershelp's matching of the two lists of token ids (`difflib`).
    """
    if weight == 1.0:
        return None, None
    found = np.full(len(chosen), weight), np.full(len(rejected), weight)
    for block in difflib.SequenceMatcher(None, chosen, rejected, autojunk=False).get_matching_blocks():
        found[0][block.a : block.a + block.size] = 1.0
        found[1][block.b : block.b + block.size] = 1.0
    return found


def _sequence(
    prompt: np.ndarray,
    feature_rows: np.ndarray,
    positions: Tensor | None,
    unseen: np.ndarray | None,
    response: np.ndarray,
    weights: np.ndarray | None,
) -> TokenSequence:
    if positions is not None:
        # Text counts on from the greatest position on any axis, as the model does when it generates.
        after = positions.max() + 1 + torch.arange(len(response))
        positions = torch.cat([positions, after.expand(len(positions), -1)], dim=1)
    return TokenSequence(
        prompt=prompt, response=response, feature_rows=feature_rows, unseen=unseen, positions=positions, weights=weights
    )


def _without_images(text: str) -> str:
    """The prompt without its placeholders, and without the lines that held nothing else."""
    places = f"(?:{re.escape(IMAGE_TOKEN)})+"
    return re.sub(rf"^{places}\n|\n{places}\Z|{places}", "", text, flags=re.MULTILINE)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
