"""What the branches of a record show: its images, corrupted ones, or those of another column; told apart, opened and encoded once a batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mmdpo_trainers.data.corruption import Corruption, Model, corrupt, masked_tokens
from mmdpo_trainers.data.pair_records import (
    CORRUPTED,
    IMAGES,
    is_corrupted,
    own_column,
    record_image,
    record_image_digest,
    record_image_size,
    record_images,
    record_name,
    record_rejected_images,
    record_target,
    view_images,
)
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.models.families import EncodedImages, Family, hiding_refusal


@dataclass(frozen=True)
class Substitute:
    """What stands in an image's place in the corrupted view."""

    key: str
    """Names the record's content and the place; the corruption is drawn by it."""
    image: Any = None
    """The record's own corrupted image, or with kind "other" the one that is shown; None: made from the image itself."""
    digest: str = ""
    own: bool = False


@dataclass(frozen=True)
class ViewPlan:
    """A record's views before anything is opened."""

    record: Mapping[str, Any]
    images: dict[str, list[Any]]
    """By view, corrupted ones left out: these are IMAGES with `substitutes`."""
    digests: dict[str, list[str]]
    """By view, content keys of `images`."""
    substitutes: dict[str, dict[int, Substitute]]
    """By corrupted view, by place among the record's images."""

    def content(self) -> tuple[list[str], dict[int, str], dict[str, Any]]:
        """What a key says of the views: images, what is in their places in the corrupted view, and other views."""
        # The key of a drawn corruption covers the prompt's text, which may say more than its tokens.
        substitutes = {
            view: {place: substitute.digest or substitute.key for place, substitute in each.items()}
            for view, each in self.substitutes.items()
        }
        first = substitutes.pop(CORRUPTED, {})
        return self.digests[IMAGES], first, {view: each for view, each in self.digests.items() if view != IMAGES} | substitutes


class Views:
    """The views of records, those named `names`. The other arguments are those of `PreferenceCollator`.

    corruptions: by corrupted view; a view without one has the records' own images.
    """

    def __init__(
        self,
        names: Collection[str],
        *,
        processor: Any,
        family: Family,
        corruptions: Mapping[str, Corruption],
        no_image: bool,
        picture_pool: Sequence[Any],
    ) -> None:
        self.processor, self.family = processor, family
        distinct = list(dict.fromkeys(names))
        self.corrupted = {name: corruptions.get(name) for name in distinct if is_corrupted(name)}
        self.columns = [name for name in distinct if name != IMAGES and name not in self.corrupted]
        self.no_image, self.picture_pool = no_image, picture_pool
        self._tokens_of_size: dict[tuple[tuple[int, int], bool], int] = {}
        kinds = {corruption.kind for corruption in self.corrupted.values() if corruption is not None}
        reason = hiding_refusal(family, family.config) if "mask" in kinds else None
        if reason is not None:
            raise ValueError(
                f"corruption: kind 'mask' hides image tokens, which cannot be with {family.name}: {reason}; choose another kind"
            )

    def images(self, record: Mapping[str, Any]) -> list[Any]:
        """The record's own images."""
        return [] if self.no_image else record_images(record)

    def tokens(self, record: Mapping[str, Any], images: Sequence[Any]) -> dict[str, list[int]]:
        """By view the tokens that stand for each of its images, by their sizes. images: the record's own."""
        found = {IMAGES: self.counts(record, images)}
        for view in self.corrupted:
            own = record_rejected_images(record, view) if images else None
            found[view] = found[IMAGES] if own is None else self.counts(record, own)
        return found | {column: self.counts(record, self._column(record, column, images)) for column in self.columns}

    def counts(self, record: Mapping[str, Any], images: Sequence[Any]) -> list[int]:
        """Tokens that stand for each of some images of one prompt, by their sizes."""
        alone = self._alone(images)
        sizes = [record_image_size(record, image) for image in images]
        for size in sizes:
            if (size, alone) not in self._tokens_of_size:
                try:
                    self._tokens_of_size[size, alone] = self.family.image_tokens(self.processor, size, alone)
                except ValueError as error:
                    raise _unfit(record, error) from error
        return [self._tokens_of_size[size, alone] for size in sizes]

    def _column(self, record: Mapping[str, Any], column: str, images: Sequence[Any]) -> list[Any]:
        return view_images(record, column) if images else []

    def _alone(self, images: Sequence[Any]) -> bool:
        """Whether a prompt's images are encoded as the only one of a prompt is."""
        return len(images) == 1 or not self.family.several_differ

    def first_difference(self, record: Mapping[str, Any], images: Sequence[Any], view: str, other: str) -> int | None:
        """The first place in which two views may show different images; None: there is none. No image is looked at."""
        if view == other or not images:
            return None
        if not {view, other} <= {IMAGES, *self.corrupted}:
            return 0
        return min(self._corrupted_places(record, images, each)[0] for each in (view, other) if each != IMAGES)

    def _corrupted_places(self, record: Mapping[str, Any], images: Sequence[Any], view: str) -> list[int]:
        """Which of the record's images a corrupted view shows otherwise."""
        if not images:
            return []
        target = record_target(record)
        own = record_rejected_images(record, view)
        return list(range(len(images))) if own is not None or target is None else [target]

    def plan(
        self, record: Mapping[str, Any], text: str, images: list[Any], opened: dict[str, Image.Image] | None = None
    ) -> ViewPlan:
        """text: of the prompt. images: the record's own. opened: gets those that had to be decoded, by digest."""
        shown = {IMAGES: images} | {column: self._column(record, column, images) for column in self.columns}
        digests = {view: [record_image_digest(record, image, opened=opened) for image in each] for view, each in shown.items()}
        substitutes = {view: self._substitutes(record, view, text, images, digests[IMAGES], opened) for view in self.corrupted}
        return ViewPlan(record, shown, digests, substitutes)

    def _substitutes(
        self,
        record: Mapping[str, Any],
        view: str,
        text: str,
        images: list[Any],
        digests: list[str],
        opened: dict[str, Image.Image] | None,
    ) -> dict[int, Substitute]:
        """By place, what a corrupted view shows of the record's images."""
        own, corruption, found = record_rejected_images(record, view), self.corrupted[view], {}
        for place in self._corrupted_places(record, images, view):
            # Views differ in what is drawn; the first one's draws are those of one view alone.
            key = sha256([digests, text, place, *([] if view == CORRUPTED else [view])])
            if own is not None:
                found[place] = Substitute(key, own[place], record_image_digest(record, own[place], opened=opened), own=True)
            elif corruption is None:
                raise DataError(
                    f"record {record_name(record)}: expected {own_column(view)}, as no corruption is set; add them, or set one"
                )
            elif corruption.kind == "other":
                found[place] = Substitute(key, *self._other(record, key, digests[place], corruption.seed))
            else:
                found[place] = Substitute(key)
        return found

    def _other(self, record: Mapping[str, Any], key: str, digest: str, seed: int) -> tuple[Any, str]:
        """An image of the pool that is not this one, drawn by the key, and its digest."""
        first, count = int(sha256([seed, key]), 16), len(self.picture_pool)
        for step in range(count):
            image = self.picture_pool[(first + step) % count]
            its_digest = record_image_digest(record, image)
            if its_digest != digest:
                return image, its_digest
        raise DataError(f"record {record_name(record)}: picture_pool holds no picture other than the record's own; add one")

    def place(self, plan: ViewPlan, batch: BatchImages, model: Model) -> dict[str, list[int]]:
        """By view the indices of its images among the batch's, as `model` is to see them."""
        record, alone = plan.record, self._alone(plan.images[IMAGES])

        def added(view: str) -> list[int]:
            return [batch.add(record, *each, alone) for each in zip(plan.images[view], plan.digests[view], strict=True)]

        found = {IMAGES: added(IMAGES)}
        for view, corruption in self.corrupted.items():
            corrupted = found[view] = list(found[IMAGES])
            for place, substitute in plan.substitutes[view].items():
                if substitute.own:
                    corrupted[place] = batch.add(record, substitute.image, substitute.digest, alone)
                elif corruption is not None and corruption.kind != "mask":
                    other = None if substitute.image is None else record_image(record, substitute.image)
                    image = batch.images[found[IMAGES][place]]
                    made = corrupt(image, corruption, substitute.key, other=other, model=model)
                    corrupted[place] = batch.add(record, made, record_image_digest(record, made), alone)
        return found | {column: added(column) for column in self.columns}

    def unseen(
        self,
        plan: ViewPlan,
        view: str,
        feature_rows: np.ndarray,
        images: list[int],
        encoded: EncodedImages | None,
        model: Model,
    ) -> np.ndarray | None:
        """(P,) bool: image tokens of a view's prompt that no token sees; None: all are seen. images: as `place` has those of IMAGES."""
        corruption = self.corrupted.get(view)
        if corruption is None or corruption.kind != "mask" or encoded is None:
            return None
        masked = [np.zeros(encoded.tokens[image], dtype=bool) for image in images]
        for place, substitute in plan.substitutes[view].items():
            if not substitute.own:
                masked[place] = masked_tokens(len(masked[place]), corruption, substitute.key, model=model)
        unseen = np.zeros(feature_rows.shape, dtype=bool)
        if masked and any(map(np.any, masked)):
            unseen[feature_rows >= 0] = np.concatenate(masked)
            return unseen
        return None


class BatchImages:
    """The distinct images of a batch, each opened once; one that is encoded in two ways counts as two."""

    def __init__(self) -> None:
        self.images: list[Image.Image] = []
        self.opened: dict[str, Image.Image] = {}
        """Those that were decoded when they were told apart, by digest."""
        self._alone: list[bool] = []
        self._records: list[Mapping[str, Any]] = []
        self._index_of: dict[tuple[str, bool], int] = {}

    def add(self, record: Mapping[str, Any], image: Any, digest: str, alone: bool) -> int:
        """Index of an image, which is opened if it is new. DataError naming the record where it cannot be."""
        if (digest, alone) not in self._index_of:
            known = self.opened.get(digest)
            self.images.append(record_image(record, image) if known is None else known)
            self._alone.append(alone)
            self._records.append(record)
            self._index_of[digest, alone] = len(self._index_of)
        return self._index_of[digest, alone]

    def encode(self, family: Family, processor: Any) -> EncodedImages | None:
        """All of them as the model takes them; None: there are none. DataError naming the record of one that is refused."""
        if not self.images:
            return None
        try:
            return family.encode_images(processor, self.images, self._alone)
        except ValueError:
            for record, image, alone in zip(self._records, self.images, self._alone, strict=True):
                try:
                    family.encode_images(processor, [image], [alone])
                except ValueError as error:
                    raise _unfit(record, error) from error
            raise


class ImagePool(Sequence[Any]):
    """The images of a dataset's records, read from their records when they are asked for."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        counts = (len(record_images(dataset[index])) for index in range(len(dataset)))
        self.places = [(index, place) for index, count in enumerate(counts) for place in range(count)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: Any) -> Any:
        index, place = self.places[number]
        return record_images(self.dataset[index])[place]


def sha256(values: Any) -> str:
    """Of JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _unfit(record: Mapping[str, Any], error: ValueError) -> DataError:
    return DataError(f"record {record_name(record)}: the image processor refuses a picture: {error}; remove the record")
