"""Single-image records to MIA-DPO's multi-image prompts: sequence, grid collage, pic-in-pic (and single, for comparison).

Everything about a prompt follows from (seed, record id, format, variant) and the set of pictures, so the order of work, a kill or
a resume cannot change it. Source: MIA-DPO (arXiv 2410.17637) and its released code.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmdpo_trainers.config.sections.data import AugmentConfig
from mmdpo_trainers.data.compose import GRID_SHAPES, box_to_region, collage_size, grid_collage, pic_in_pic
from mmdpo_trainers.data.images import ImageError, Picture, content_key, png_bytes, read_image
from mmdpo_trainers.data.records import FORMATS, IMAGE_TOKEN, prompt_record, relative_images
from mmdpo_trainers.data.sources import Problem, SourceRecord
from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.files.atomic import write_atomic
from mmdpo_trainers.files.fingerprint import content_hash

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
    if formats.get("grid"):
        _check_collages(options, max_pixels)
    dot = Image.new("RGB", (1, 1))
    try:
        _, box = pic_in_pic(dot, dot, max_fraction=options.max_fraction, square=options.square)
        box_to_region(box, options.patch_grid or (1, 1))
    except ValueError as error:
        raise ConfigError(f"augment: {error}") from error


def _check_collages(options: AugmentConfig, max_pixels: int) -> None:
    for count in (count for count, share in options.num_images["grid"].items() if share):
        try:
            width, height = collage_size(count, **_collage_options(options))
        except ValueError as error:
            raise ConfigError(f"augment: {error}") from error
        if width * height > max_pixels:
            raise ConfigError(
                f"augment.cell_size: a collage of {count} pictures with cell_size={options.cell_size} and margin={options.margin} "
                f"has {width} x {height} pixels, above data.max_pixels={max_pixels}; lower cell_size or margin"
            )


def plan_prompts(records: Sequence[SourceRecord], seed: int, formats: dict[str, float]) -> Iterator[Planned]:
    """Endless rounds over the records, each round in its own shuffled order, a format drawn for each by its share."""
    names, shares = list(formats), list(formats.values())
    for variant in itertools.count():
        for record in sorted(records, key=lambda r: _digest(seed, "order", *names, r.id, variant)):
            rng = random.Random(f"{seed}|format|{record.id}|{variant}")
            yield record, rng.choices(names, shares)[0], variant


def prompt_id(record: SourceRecord, format: str, variant: int) -> str:
    """Id of a prompt, unique over formats and variants."""
    return f"{record.id}/{format}" if variant == 0 else f"{record.id}/{format}~{variant + 1}"


class PromptMaker:
    """Makes prompt records and the pictures they need.

    records: the source whose pictures serve as companions. folder: where the prompts' file lies; pictures go to `folder/images`.
    root: the run folder; pictures below it are stored as relative paths. patch_grid: of one picture, for regions.
    """

    def __init__(
        self,
        records: Sequence[SourceRecord],
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
        self._owners: dict[Path, str] = {}
        for record in sorted(records, key=lambda r: r.id):
            self._owners.setdefault(record.picture, record.id)
        self._pictures = sorted(self._owners, key=lambda path: self._owners[path])
        self._problems: list[Problem] = []
        self.read = functools.lru_cache(maxsize=16)(self._read)
        self.content = functools.lru_cache(maxsize=None)(content_hash)

    def make(self, record: SourceRecord, format: str, variant: int) -> tuple[dict[str, Any] | None, list[Problem]]:
        """The prompt record, or None where it cannot be made, and what was found wrong with pictures on the way."""
        rng = random.Random(f"{self.seed}|prompt|{record.id}|{format}|{variant}")
        self._problems = []
        target = self._open(record.picture, record.id)
        if target is None:
            return None, self._problems
        count = self._count(format, rng)
        companions = self._companions(record, count - 1, rng)
        if companions is None:
            detail = f"{format} of {count} needs {count - 1} other pictures that can be read and differ; there are fewer"
            return None, [*self._problems, Problem(record.id, TOO_FEW, detail)]
        place = rng.randrange(count)
        paths = [*companions[:place], record.picture, *companions[place:]]
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

    def _single(self, record: SourceRecord, paths: list[Path], place: int, rng: random.Random) -> dict[str, Any]:
        return {"images": [self._stored(record.picture)], "prompt": f"{IMAGE_TOKEN}\n{record.question}", "target": 0}

    def _sequence(self, record: SourceRecord, paths: list[Path], place: int, rng: random.Random) -> dict[str, Any]:
        lines = "".join(f"Image{k}:{IMAGE_TOKEN}\n" for k in range(1, len(paths) + 1))
        prompt = f"{lines}In Image{place + 1}, {_lowered(record.question)}"
        return {"images": [self._stored(path) for path in paths], "prompt": prompt, "target": place}

    def _grid(self, record: SourceRecord, paths: list[Path], place: int, rng: random.Random) -> dict[str, Any]:
        collage, boxes = grid_collage([self.read(path).image for path in paths], **_collage_options(self.options))
        prompt = f"{IMAGE_TOKEN}\nIn Image{place + 1}, {_lowered(record.question)}"
        return {"images": [self._saved(collage)], "prompt": prompt, "target": place, **self._placed(boxes[place])}

    def _pip(self, record: SourceRecord, paths: list[Path], place: int, rng: random.Random) -> dict[str, Any]:
        host, target = self.read(paths[1 - place]).image, self.read(record.picture).image
        if self.options.square and max(host.size) ** 2 > self.max_pixels:
            size = f"{host.width} x {host.height}"
            raise ImageError("enormous", f"a host of {size} padded to a square has more than {self.max_pixels} pixels")
        picture, box = pic_in_pic(host, target, max_fraction=self.options.max_fraction, square=self.options.square)
        opening = rng.choice(self.options.pip_openings or PIP_OPENINGS)
        prompt = f"{IMAGE_TOKEN}\n{opening} {_lowered(record.question)}"
        return {"images": [self._saved(picture)], "prompt": prompt, "target": 0, **self._placed(box)}

    def _placed(self, box: Sequence[float]) -> dict[str, Any]:
        region = None if self.patch_grid is None else box_to_region(box, self.patch_grid)
        return {"box": box, "region": region, "patch_grid": self.patch_grid}

    def _count(self, format: str, rng: random.Random) -> int:
        if format not in ("sequence", "grid"):
            return 2 if format == "pip" else 1
        counts = self.options.num_images[format]
        return rng.choices(list(counts), list(counts.values()))[0]

    def _companions(self, record: SourceRecord, count: int, rng: random.Random) -> list[Path] | None:
        """Readable pictures with contents of their own, none of them the target's, drawn at random; None: there are too few."""
        chosen: list[Path] = []
        contents = {self.content(record.picture)}
        for index in _draws(len(self._pictures), rng):
            if len(chosen) == count:
                break
            path = self._pictures[index]
            if path == record.picture or self._open(path, self._owners[path]) is None:
                continue
            content = self.content(path)
            if content not in contents:
                contents.add(content)
                chosen.append(path)
        return chosen if len(chosen) == count else None

    def _read(self, path: Path) -> Picture:
        return read_image(path, max_pixels=self.max_pixels)

    def _open(self, path: Path, record_id: str) -> Picture | None:
        try:
            picture = self.read(path)
        except ImageError as error:
            self._problems.append(Problem(record_id, error.reason, error.detail))
            return None
        if picture.converted:
            detail = f"{path} was converted to 8-bit RGB"
            self._problems.append(Problem(record_id, f"converted {picture.converted}", detail, dropped=False))
        return picture

    def _stored(self, path: Path) -> str:
        """The file itself where any reader sees the same picture in it, a converted copy otherwise."""
        picture = self.read(path)
        return self._saved(picture.image) if picture.converted else str(path)

    def _saved(self, image: Image.Image) -> str:
        data = png_bytes(image)
        file = self.folder / "images" / f"{content_key(data)}.png"
        if not file.exists():
            # Waiting for the disk at each of thousands of small files would take longer than making them.
            write_atomic(file, data, durable=False)
        return str(file)


def _draws(count: int, rng: random.Random) -> Iterator[int]:
    """All indices below `count` in random order, drawn one by one (a Fisher-Yates shuffle that stores only what moved)."""
    moved: dict[int, int] = {}
    for last in range(count - 1, -1, -1):
        pick = rng.randrange(last + 1)
        yield moved.get(pick, pick)
        moved[pick] = moved.pop(last, last)


def _collage_options(options: AugmentConfig) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("cell_size", "margin", "label", "square")}


def _lowered(question: str) -> str:
    return question[:1].lower() + question[1:]


def _digest(*parts: object) -> str:
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()
