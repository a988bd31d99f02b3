"""Preference records to tokenised examples: a record's branches as token sequences, their pictures opened, corrupted and encoded once."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdpo_trainers.data.corruption import Corruption, Model, corrupt, masked_tokens
from mmdpo_trainers.data.pair_records import (
    check_content,
    picture_digest,
    picture_size,
    prompt_text,
    record_images,
    record_name,
    record_picture,
    record_rejected_images,
    record_target,
    response_text,
)
from mmdpo_trainers.data.records import IMAGE_TOKEN
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.models.families import EncodedPictures, Family, expand_ids
from mmdpo_trainers.models.template_date import TemplateDate
from mmdpo_trainers.models.token_rules import TextEncoder

"""What a record can be scored on: its responses, and the chosen one behind the prompt with corrupted pictures."""


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
    text: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    images: list[Any]


@dataclass(frozen=True)
class _Substitute:
    """What stands in a picture's place in the corrupted branch."""

    key: str
    """Names the record's content and the place; the corruption is drawn by it."""
    image: Any = None
    """The record's own corrupted picture, or with kind "other" the picture that is shown; None: made from the picture itself."""
    digest: str = ""
    own: bool = False


@dataclass(frozen=True)
class _Plan:
    texts: _Texts
    digests: list[str]
    substitutes: dict[int, _Substitute]
    """By place among the record's pictures."""


class ExampleMaker:
    """See `PreferenceCollator`, whose arguments these are."""

    def __init__(
        self,
        processor: Any,
        *,
        family: Family,
        image_token_id: int,
        end_id: int,
        branches: Sequence[str],
        corruption: Corruption | None,
        no_image: bool,
        changed_token_weight: float,
        picture_pool: Sequence[Any],
        date: TemplateDate | None,
    ) -> None:
        self.processor, self.family = processor, family
        self.image_token_id, self.end_id = image_token_id, end_id
        self.branches = tuple(branches)
        self.corruption = corruption
        self.no_image = no_image
        self.changed_token_weight = changed_token_weight
        self.picture_pool = picture_pool
        ends = {end_id, processor.tokenizer.eos_token_id} - {None}
        self._encoder = TextEncoder(processor, image_token_id=image_token_id, end_ids=ends, date=date)
        self._tokens_of_size: dict[tuple[tuple[int, int], bool], int] = {}
        if family.cross_attention and corruption is not None and corruption.kind == "mask" and "corrupted" in branches:
            raise ValueError(f"corruption: kind 'mask' hides image tokens, and {family.name} has none; choose another kind")
        self._settings = self._settings_digest()

    @property
    def corrupted(self) -> bool:
        """Whether there is a corrupted branch."""
        return "corrupted" in self.branches

    def examples(self, records: Sequence[Mapping[str, Any]], model: Model) -> tuple[list[Example], EncodedPictures | None]:
        """The records as `model` (policy or reference) is to see them, and their distinct pictures."""
        pictures = _Pictures()
        plans = [self._plan(self._texts(record), pictures.opened) for record in records]
        drafts = [(plan, *self._place(plan, pictures, model)) for plan in plans]
        encoded = pictures.encode(self.family, self.processor)
        return [self._example(*draft, encoded, model) for draft in drafts], encoded

    def length(self, record: Mapping[str, Any]) -> int:
        """Tokens of the record's longest branch. Of its pictures only the sizes are read."""
        texts = self._texts(record)
        prompt = len(texts.prompt) + sum(self._counts(record, texts.images)) - len(texts.images)
        lengths = [prompt + max(len(texts.chosen), len(texts.rejected))]
        own = record_rejected_images(record) if self.corrupted and texts.images else None
        if own is not None:
            lengths.append(len(texts.prompt) + sum(self._counts(record, own)) - len(own) + len(texts.chosen))
        return max(lengths)

    def tree_tokens(self, record: Mapping[str, Any]) -> int:
        """Tokens of a tree of this record alone. Of its pictures only the sizes are read.

        Kind "mask" may take fewer: image tokens before the first masked one are shared.
        """
        texts = self._texts(record)
        counts = self._counts(record, texts.images)
        tokens = len(texts.prompt) + sum(counts) - len(counts)
        tokens += len(texts.chosen) + len(texts.rejected) - _common(texts.chosen, texts.rejected)
        places = self._corrupted_places(texts)
        if places:
            own = record_rejected_images(record)
            corrupted = counts if own is None else self._counts(record, own)
            before = [place for place, token in enumerate(texts.prompt) if token == self.image_token_id][places[0]]
            shared = before + sum(counts[: places[0]]) - places[0]
            tokens += len(texts.prompt) + sum(corrupted) - len(corrupted) - shared + len(texts.chosen)
        return tokens

    def shared_tokens(self, records: Sequence[Mapping[str, Any]]) -> int:
        """See `PreferenceCollator.shared_tokens`."""
        texts = [self._texts(record) for record in records]
        first = texts[0].prompt
        common = min(_common(first, other.prompt) for other in texts)
        pictures = first[:common].count(self.image_token_id)
        return common + sum(self._counts(records[0], texts[0].images[:pictures])) - pictures

    def key(self, record: Mapping[str, Any]) -> str:
        """See `PreferenceCollator.key`."""
        return self._key(self._plan(self._texts(record)))

    def picture_key(self, record: Mapping[str, Any]) -> str:
        """See `PreferenceCollator.picture_key`."""
        images = [] if self.no_image else record_images(record)
        if not images:
            return self.key(record)
        return _sha256([picture_digest(record, image) for image in images])

    def _texts(self, record: Mapping[str, Any]) -> _Texts:
        check_content(record)
        text, images = prompt_text(record), record_images(record)
        if self.no_image:
            text, images = _without_pictures(text), []
        prompt = self._encoder.prompt(record_name(record), text)
        found = prompt.count(self.image_token_id)
        if found != len(images):
            raise DataError(
                f"record {record_name(record)}: the prompt has {found} image tokens for {len(images)} pictures; write {IMAGE_TOKEN} "
                "for a picture, and take the model's own image token out of the text"
            )
        chosen, rejected = (self._response(record, column) for column in ("chosen", "rejected"))
        return _Texts(record, text, prompt, chosen, rejected, images)

    def _response(self, record: Mapping[str, Any], column: str) -> list[int]:
        ids = self._encoder.answer(record_name(record), column, response_text(record, column))
        if column == "chosen" and not ids:
            raise DataError(f"record {record_name(record)}: chosen is an end token alone; give it a text, or remove the record")
        return [*ids, self.end_id]

    def _counts(self, record: Mapping[str, Any], images: Sequence[Any]) -> list[int]:
        """Tokens that stand for each of a prompt's pictures, by their sizes."""
        alone = self._alone(images)
        sizes = [picture_size(record, image) for image in images]
        for size in sizes:
            if (size, alone) not in self._tokens_of_size:
                try:
                    self._tokens_of_size[size, alone] = self.family.picture_tokens(self.processor, size, alone)
                except ValueError as error:
                    raise _unfit(record, error) from error
        return [self._tokens_of_size[size, alone] for size in sizes]

    def _alone(self, images: Sequence[Any]) -> bool:
        """Whether a prompt's pictures are encoded as the only one of a prompt is."""
        return len(images) == 1 or not self.family.several_differ

    def _corrupted_places(self, texts: _Texts) -> list[int]:
        """Which of the record's pictures the corrupted branch shows otherwise."""
        if not self.corrupted or not texts.images:
            return []
        target = record_target(texts.record)
        own = record_rejected_images(texts.record)
        return list(range(len(texts.images))) if own is not None or target is None else [target]

    def _plan(self, texts: _Texts, opened: dict[str, Image.Image] | None = None) -> _Plan:
        """opened: gets the pictures that had to be decoded, by digest."""
        digests = [picture_digest(texts.record, image, opened=opened) for image in texts.images]
        own = record_rejected_images(texts.record) if self.corrupted else None
        substitutes = {}
        for place in self._corrupted_places(texts):
            key = _sha256([digests, texts.text, place])
            if own is not None:
                substitute = _Substitute(key, own[place], picture_digest(texts.record, own[place], opened=opened), own=True)
            elif self.corruption is None:
                raise DataError(
                    f"record {record_name(texts.record)}: expected rejected_images, as no corruption is set; add them, or set one"
                )
            elif self.corruption.kind == "other":
                substitute = _Substitute(key, *self._other(texts.record, key, digests[place]))
            else:
                substitute = _Substitute(key)
            substitutes[place] = substitute
        return _Plan(texts, digests, substitutes)

    def _other(self, record: Mapping[str, Any], key: str, digest: str) -> tuple[Any, str]:
        """A picture of the pool that is not this one, drawn by the key, and its digest."""
        seed = 0 if self.corruption is None else self.corruption.seed
        first, count = int(_sha256([seed, key]), 16), len(self.picture_pool)
        for step in range(count):
            image = self.picture_pool[(first + step) % count]
            its_digest = picture_digest(record, image)
            if its_digest != digest:
                return image, its_digest
        raise DataError(f"record {record_name(record)}: picture_pool holds no picture other than the record's own; add one")

    def _key(self, plan: _Plan) -> str:
        texts = plan.texts
        # The key of a drawn corruption covers the prompt's text, which may say more than its tokens.
        substitutes = {place: substitute.digest or substitute.key for place, substitute in plan.substitutes.items()}
        return _sha256([self._settings, texts.prompt, texts.chosen, texts.rejected, plan.digests, substitutes])

    def _settings_digest(self) -> str:
        """What all keys share: what a record's log-probabilities depend on besides the record and the model."""
        corruption = dataclasses.asdict(self.corruption) if self.corruption is not None and self.corrupted else None
        return _sha256(
            [
                *(
                    self.family.name,
                    self.processor.image_processor.to_json_string(),
                    self._processor_settings(),
                    self.branches,
                    corruption,
                ),
                *(self.no_image, self.changed_token_weight),
            ]
        )

    def _processor_settings(self) -> dict[str, Any]:
        """The processor's own settings: they say how many tokens a picture has, which a prompt with one for each does not."""
        plain = {name: value for name, value in vars(self.processor).items() if isinstance(value, int | float | str)}
        return {name: plain[name] for name in sorted(plain) if name != "chat_template"}

    def _place(self, plan: _Plan, pictures: _Pictures, model: Model) -> tuple[list[int], list[int]]:
        """Indices of the record's pictures, and of those that the corrupted branch shows, among the batch's."""
        record = plan.texts.record
        alone = self._alone(plan.texts.images)
        shown = [
            pictures.add(record, image, digest, alone) for image, digest in zip(plan.texts.images, plan.digests, strict=True)
        ]
        corrupted = list(shown)
        for place, substitute in plan.substitutes.items():
            if substitute.own:
                corrupted[place] = pictures.add(record, substitute.image, substitute.digest, alone)
            elif self.corruption is not None and self.corruption.kind != "mask":
                other = None if substitute.image is None else record_picture(record, substitute.image)
                picture = pictures.images[shown[place]]
                made = corrupt(picture, self.corruption, substitute.key, other=other, model=model)
                corrupted[place] = pictures.add(record, made, picture_digest(record, made), alone)
        return shown, corrupted

    def _example(
        self, plan: _Plan, shown: list[int], corrupted: list[int], encoded: EncodedPictures | None, model: Model
    ) -> Example:
        texts = plan.texts
        positions: dict[tuple[bytes, bytes | None], Tensor | None] = {}
        prompt = self._prompt(texts.prompt, shown, encoded, positions)
        chosen, rejected = np.array(texts.chosen), np.array(texts.rejected)
        chosen_weights, rejected_weights = changed_token_weights(texts.chosen, texts.rejected, self.changed_token_weight)
        sequences = {
            "chosen": _sequence(*prompt, chosen, chosen_weights),
            "rejected": _sequence(*prompt, rejected, rejected_weights),
        }
        if self.corrupted:
            other = prompt if corrupted == shown else self._prompt(texts.prompt, corrupted, encoded, positions)
            unseen = self._unseen(plan, other[1], shown, encoded, model)
            sequences["corrupted"] = _sequence(*other, chosen, chosen_weights, unseen)
        return Example(
            record=texts.record,
            key=self._key(plan),
            sequences=tuple(sequences[branch] for branch in self.branches),
            pictures=shown,
        )

    def _prompt(
        self,
        prompt: list[int],
        pictures: list[int],
        encoded: EncodedPictures | None,
        positions: dict[tuple[bytes, bytes | None], Tensor | None],
    ) -> tuple[np.ndarray, np.ndarray, Tensor | None]:
        """The prompt with each picture's tokens in its place, the feature rows of its tokens, and its positions.

        positions: those known by token ids and grids; a corrupted picture's are those of the picture itself.
        """
        blocks = [] if encoded is None else [encoded.blocks[picture] for picture in pictures]
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

    def _unseen(
        self, plan: _Plan, feature_rows: np.ndarray, shown: list[int], encoded: EncodedPictures | None, model: Model
    ) -> np.ndarray | None:
        if self.corruption is None or self.corruption.kind != "mask" or encoded is None:
            return None
        masked = [np.zeros(encoded.tokens[picture], dtype=bool) for picture in shown]
        for place, substitute in plan.substitutes.items():
            if not substitute.own:
                masked[place] = masked_tokens(len(masked[place]), self.corruption, substitute.key, model=model)
        unseen = np.zeros(feature_rows.shape, dtype=bool)
        if masked and any(map(np.any, masked)):
            unseen[feature_rows >= 0] = np.concatenate(masked)
            return unseen
        return None


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


class _Pictures:
    """The distinct pictures of a batch, each opened once; one that is encoded in two ways counts as two."""

    def __init__(self) -> None:
        self.images: list[Image.Image] = []
        self.opened: dict[str, Image.Image] = {}
        """Those that were decoded when they were told apart, by digest."""
        self._alone: list[bool] = []
        self._records: list[Mapping[str, Any]] = []
        self._index_of: dict[tuple[str, bool], int] = {}

    def add(self, record: Mapping[str, Any], image: Any, digest: str, alone: bool) -> int:
        """Index of a picture, which is opened if it is new. DataError naming the record where it cannot be."""
        if (digest, alone) not in self._index_of:
            known = self.opened.get(digest)
            self.images.append(record_picture(record, image) if known is None else known)
            self._alone.append(alone)
            self._records.append(record)
            self._index_of[digest, alone] = len(self._index_of)
        return self._index_of[digest, alone]

    def encode(self, family: Family, processor: Any) -> EncodedPictures | None:
        """All of them as the model takes them; None: there are none. DataError naming the record of one that is refused."""
        if not self.images:
            return None
        try:
            return family.encode_pictures(processor, self.images, self._alone)
        except ValueError:
            for record, image, alone in zip(self._records, self.images, self._alone, strict=True):
                try:
                    family.encode_pictures(processor, [image], [alone])
                except ValueError as error:
                    raise _unfit(record, error) from error
            raise


def _sequence(
    prompt: np.ndarray,
    feature_rows: np.ndarray,
    positions: Tensor | None,
    response: np.ndarray,
    weights: np.ndarray | None,
    unseen: np.ndarray | None = None,
) -> TokenSequence:
    if positions is not None:
        # Text counts on from the greatest position on any axis, as the model does when it generates.
        after = positions.max() + 1 + torch.arange(len(response))
        positions = torch.cat([positions, after.expand(len(positions), -1)], dim=1)
    return TokenSequence(
        prompt=prompt, response=response, feature_rows=feature_rows, unseen=unseen, positions=positions, weights=weights
    )


def _without_pictures(text: str) -> str:
    """The prompt without its placeholders, and without the lines that held nothing else."""
    places = f"(?:{re.escape(IMAGE_TOKEN)})+"
    return re.sub(rf"^{places}\n|\n{places}\Z|{places}", "", text, flags=re.MULTILINE)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def _sha256(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _unfit(record: Mapping[str, Any], error: ValueError) -> DataError:
    return DataError(f"record {record_name(record)}: the image processor refuses a picture: {error}; remove the record")
