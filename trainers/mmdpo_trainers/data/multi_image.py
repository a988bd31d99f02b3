"""Single-image records to MIA-DPO's multi-image prompts: sequence, grid collage, pic-in-pic (and single, for comparison).

Everything about a prompt follows from (seed, record id, format, variant) and the set of pictures, so the order of work, a kill or
a resume cannot change it. Source: MIA-DPO (arXiv 2410.17637) and its released code.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.config.sections.data import AugmentConfig
from mmdpo_trainers.data.compose import GRID_SHAPES, box_to_region, collage_size, pic_in_pic_place
from mmdpo_trainers.data.images import ImageError
from mmdpo_trainers.data.looks import Look, Looks
from mmdpo_trainers.data.recipes import LAYOUTS, Recipe
from mmdpo_trainers.data.records import FORMATS, IMAGE_TOKEN, TEXT, prompt_record, relative_images
from mmdpo_trainers.data.source_records import SourceRecords, shuffled
from mmdpo_trainers.data.sources import Problem, SourceRecord, TextRecord
from mmdpo_trainers.errors import ConfigError

PIP_OPENINGS = (
    "For the image in the centre,",
    "For the picture in the middle,",
    "For the small picture in the centre of the image,",
    "For the picture inside the picture,",
    "In the central picture,",
    "In the image placed in the middle,",
    "In the smaller image at the centre,",
    "In the picture pasted in the centre,",
    "In the embedded picture,",
    "In the inset,",
    "Looking at the image in the centre,",
    "Looking only at the smaller picture inside,",
    "Considering only the central image,",
    "Considering the picture that is placed in the centre,",
    "Regarding the image in the middle,",
    "Concerning the small image inside the main one,",
    "About the inset in the centre of the image,",
    "About the picture in the inner frame,",
    "Focus on the central picture:",
    "Focusing on the image in the middle,",
    "Based on the picture in the centre,",
    "Based only on the image pasted in the middle,",
    "According to the inner image,",
    "Given the picture located in the centre,",
    "Referring to the smaller picture,",
    "With the embedded image in focus,",
)
"""Ways to point at the pasted picture."""

TOO_FEW = "too_few_pictures"
"""Reason of a prompt, though not of its record, for which there are no companions."""

Planned = tuple[SourceRecord, str, int]
"""A prompt to make: record, format, variant (0: the record's first prompt of this plan)."""


def check_options(
    options: AugmentConfig, formats: Mapping[str, float], *, max_pixels: int, setting: str = "augment.formats"
) -> None:
    """Raise ConfigError for formats, numbers of pictures or shares that cannot be made.

    formats: format -> share or number of prompts, as `setting` has them. max_pixels: the most that a collage may have.
    """
    for name, share in formats.items():
        if name not in FORMATS:
            raise ConfigError(f"{setting}: unknown format {name!r}; expected {', '.join(FORMATS)}")
        if not 0 <= share < math.inf:
            raise ConfigError(f"{setting}.{name}: expected a number from 0 up, got {share}")
    if not any(formats.values()):
        raise ConfigError(f"{setting}: at least one format needs a number above 0")
    for name, counts in options.num_images.items():
        if name not in ("sequence", "grid"):
            raise ConfigError(f"augment.num_images: {name!r} has no number of pictures to choose; expected sequence, grid")
        for count, share in counts.items():
            allowed = count in GRID_SHAPES if name == "grid" else count >= 2
            if not allowed or not 0 <= share < math.inf:
                words = ", ".join(map(str, GRID_SHAPES)) if name == "grid" else "2 or more"
                raise ConfigError(f"augment.num_images.{name}: expected {words} pictures, shares from 0 up; got {count}: {share}")
    for name in ("sequence", "grid"):
        if formats.get(name) and not any(options.num_images.get(name, {}).values()):
            raise ConfigError(f"augment.num_images.{name}: at least one number of pictures needs a share above 0")
    if options.num_prompts is not None and options.num_prompts < 1:
        raise ConfigError(f"augment.num_prompts: expected 1 or more, got {options.num_prompts}")
    if not 0 < options.per_record < math.inf:
        raise ConfigError(f"augment.per_record: expected a number above 0, got {options.per_record}")
    for opening in options.pip_openings or ():
        if IMAGE_TOKEN in opening:
            raise ConfigError(
                f"augment.pip_openings: {IMAGE_TOKEN} stands for a picture and may not be in an opening: {opening!r}"
            )
    if bool(options.text_share) != bool(options.text_source):
        raise ConfigError(
            f"augment.text_share: expected a share above 0 exactly where there is an augment.text_source, got {options.text_share} and "
            f"{options.text_source}"
        )
    if formats.get("grid"):
        _check_collages(options, max_pixels)
    try:
        box = pic_in_pic_place((1, 1), (1, 1), **_layout("pip", options))[2]
        box_to_region(box, options.patch_grid or (1, 1))
    except ValueError as error:
        raise ConfigError(f"augment: {error}") from error


def _check_collages(options: AugmentConfig, max_pixels: int) -> None:
    for count in (count for count, share in options.num_images["grid"].items() if share):
        try:
            width, height = collage_size(count, **_layout("grid", options))
        except ValueError as error:
            raise ConfigError(f"augment: {error}") from error
        if width * height > max_pixels:
            raise ConfigError(
                f"augment.cell_size: a collage of {count} pictures with cell_size={options.cell_size} and margin={options.margin} "
                f"has {width} x {height} pixels, above data.max_pixels={max_pixels}; lower cell_size or margin"
            )


def plan_prompts(records: SourceRecords, seed: int, formats: dict[str, float]) -> Iterator[Planned]:
    """Endless rounds over the records, each round in its own shuffled order, a format drawn for each by its share."""
    names, shares = list(formats), list(formats.values())
    for variant in itertools.count():
        for index in shuffled(records.ids(), (seed, "order", *names), (variant,)):
            record = records[index]
            rng = random.Random(f"{seed}|format|{record.id}|{variant}")
            yield record, rng.choices(names, shares)[0], variant


def prompt_id(record: SourceRecord, format: str, variant: int) -> str:
    """Id of a prompt, unique over formats and variants."""
    return f"{record.id}/{format}" if variant == 0 else f"{record.id}/{format}~{variant + 1}"


def text_prompts(records: Sequence[TextRecord], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` prompts without pictures, each record at most once, in an order drawn with the seed."""
    drawn = sorted(records, key=lambda record: _digest(seed, "order", TEXT, record.id))[:count]
    return [
        prompt_record(
            id=f"{record.id}/{TEXT}",
            source_id=record.id,
            format=TEXT,
            images=[],
            prompt=record.question,
            answer=record.answer,
            target=None,
            num_images=0,
            options=record.options,
        )
        for record in drawn
    ]


class PromptMaker:
    """Makes prompt records. Their pictures are files of the source, or recipes that are made of these: none is written.

    pictures: of the source, which serve as companions, each with the id of its first record. folder: where the prompts' file lies.
    root: the run folder; pictures below it are stored as relative paths. patch_grid: of one picture, for regions.
    """

    def __init__(
        self,
        pictures: Mapping[str, str],
        options: AugmentConfig,
        *,
        seed: int,
        patch_grid: tuple[int, int] | None,
        folder: Path,
        root: Path,
        max_pixels: int,
    ) -> None:
        self.options, self.seed, self.patch_grid = options, seed, patch_grid
        self.folder, self.root, self.max_pixels = folder, root, max_pixels
        self._owners = pictures
        self._pictures = sorted(pictures, key=lambda path: pictures[path])
        self._problems: list[Problem] = []
        self.looks = Looks(max_pixels=max_pixels)

    def prepare(self, planned: Sequence[Planned]) -> None:
        """Look at the pictures that the prompts need, where all can be used."""
        needed = []
        for record, format, variant in planned:
            rng = self._random(record, format, variant)
            own, count = str(record.picture), self._count(format, rng)
            drawn = (self._pictures[index] for index in _draws(len(self._pictures), rng))
            needed += [own, *itertools.islice((path for path in drawn if path != own), count - 1)]
        self.looks.prepare(needed)

    def make(self, record: SourceRecord, format: str, variant: int) -> tuple[dict[str, Any] | None, list[Problem]]:
        """The prompt record, or None where it cannot be made, and what was found wrong with pictures on the way."""
        rng = self._random(record, format, variant)
        self._problems = []
        own = str(record.picture)
        if self._usable(own, record.id) is None:
            return None, self._problems
        count = self._count(format, rng)
        companions = self._companions(own, count - 1, rng)
        if companions is None:
            detail = f"{format} of {count} needs {count - 1} other pictures that can be read and differ; there are fewer"
            return None, [*self._problems, Problem(record.id, TOO_FEW, detail)]
        place = rng.randrange(count)
        paths = [*companions[:place], own, *companions[place:]]
        build = {"single": self._single, "sequence": self._sequence, "grid": self._grid, "pip": self._pip}[format]
        try:
            fields = build(record, paths, place, rng)
        except ImageError as error:
            return None, [*self._problems, Problem(record.id, error.reason, error.detail)]
        fields["images"] = relative_images(fields["images"], self.folder, self.root)
        made = prompt_record(
            id=prompt_id(record, format, variant),
            source_id=record.id,
            format=format,
            answer=record.answer,
            num_images=count,
            options=record.options,
            **fields,
        )
        return made, self._problems

    def _random(self, record: SourceRecord, format: str, variant: int) -> random.Random:
        return random.Random(f"{self.seed}|prompt|{record.id}|{format}|{variant}")

    def _single(self, record: SourceRecord, paths: list[str], place: int, rng: random.Random) -> dict[str, Any]:
        return {"images": paths, "prompt": f"{IMAGE_TOKEN}\n{record.question}", "target": 0}

    def _sequence(self, record: SourceRecord, paths: list[str], place: int, rng: random.Random) -> dict[str, Any]:
        lines = "".join(f"Image{k}:{IMAGE_TOKEN}\n" for k in range(1, len(paths) + 1))
        prompt = f"{lines}In Image{place + 1}, {_lowered(record.question)}"
        return {"images": paths, "prompt": prompt, "target": place}

    def _grid(self, record: SourceRecord, paths: list[str], place: int, rng: random.Random) -> dict[str, Any]:
        prompt = f"{IMAGE_TOKEN}\nIn Image{place + 1}, {_lowered(record.question)}"
        return {"prompt": prompt, "target": place, **self._composed("grid", paths, place)}

    def _pip(self, record: SourceRecord, paths: list[str], place: int, rng: random.Random) -> dict[str, Any]:
        width, height = self.looks(paths[1 - place]).size
        if self.options.square and max(width, height) ** 2 > self.max_pixels:
            raise ImageError(
                "enormous", f"a host of {width} x {height} padded to a square has more than {self.max_pixels} pixels"
            )
        opening = rng.choice(self.options.pip_openings or PIP_OPENINGS)
        prompt = f"{IMAGE_TOKEN}\n{opening} {_lowered(record.question)}"
        return {"prompt": prompt, "target": 0, **self._composed("pip", [paths[1 - place], paths[place]], 1)}

    def _composed(self, kind: str, paths: Sequence[str], target: int) -> dict[str, Any]:
        """One picture of several, as a recipe, and where the target is in it."""
        looks = [self.looks(path) for path in paths]
        recipe = Recipe(kind, tuple(paths), _layout(kind, self.options), tuple(look.mark for look in looks))
        box = recipe.box(target, [look.size for look in looks])
        region = None if self.patch_grid is None else box_to_region(box, self.patch_grid)
        return {"images": [recipe.stored()], "box": box, "region": region, "patch_grid": self.patch_grid}

    def _count(self, format: str, rng: random.Random) -> int:
        if format not in ("sequence", "grid"):
            return 2 if format == "pip" else 1
        counts = self.options.num_images[format]
        return rng.choices(list(counts), list(counts.values()))[0]

    def _companions(self, own: str, count: int, rng: random.Random) -> list[str] | None:
        """Readable pictures with contents of their own, none of them the target's, drawn at random; None: there are too few."""
        chosen: list[str] = []
        marks = {self.looks(own).mark}
        for index in _draws(len(self._pictures), rng):
            if len(chosen) == count:
                break
            path = self._pictures[index]
            if path == own or (look := self._usable(path, self._owners[path])) is None:
                continue
            if look.mark not in marks:
                marks.add(look.mark)
                chosen.append(path)
        return chosen if len(chosen) == count else None

    def _usable(self, path: str, record_id: str) -> Look | None:
        look = self.looks(path)
        if look.error is not None:
            self._problems.append(Problem(record_id, *look.error))
            return None
        if look.converted:
            detail = f"{path} was converted to 8-bit RGB"
            self._problems.append(Problem(record_id, f"converted {look.converted}", detail, dropped=False))
        return look


def _draws(count: int, rng: random.Random) -> Iterator[int]:
    """All indices below `count` in random order, drawn one by one (a Fisher-Yates shuffle that stores only what moved)."""
    moved: dict[int, int] = {}
    for last in range(count - 1, -1, -1):
        pick = rng.randrange(last + 1)
        yield moved.get(pick, pick)
        moved[pick] = moved.pop(last, last)


def _layout(kind: str, options: AugmentConfig) -> dict[str, Any]:
    return {name: getattr(options, name) for name, _ in LAYOUTS[kind]}


def _lowered(question: str) -> str:
    return question[:1].lower() + question[1:]


def _digest(*parts: object) -> str:
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()
