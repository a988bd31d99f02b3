"""What prompts are made of: the records of training and of evaluation, and how many of a source's cannot be used."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmdpo_trainers.config.sections.data import DataConfig
from mmdpo_trainers.data.held_out import hold_out
from mmdpo_trainers.data.layouts import LayoutReader
from mmdpo_trainers.data.left_out import check_left_out, counted, named
from mmdpo_trainers.data.multi_image import text_prompts
from mmdpo_trainers.data.records import TEXT
from mmdpo_trainers.data.source_records import SourceRecords
from mmdpo_trainers.data.sources import DUPLICATE, Problem, SourceRecord, TextRecord, read_source, read_texts
from mmdpo_trainers.data.streams import existing
from mmdpo_trainers.errors import ConfigError, DataError
from mmdpo_trainers.files.spool import Spool
from mmdpo_trainers.stages.context import StageContext

SHAPES = "shapes"
EVALUATION_SEED = 1_000_003
"""Added to the run's seed for the evaluation pictures of the built-in world, which are thus never the training pictures."""


@dataclass
class Source:
    """What there is to make prompts of. rows: records of the source that were read; lost: those of them that cannot be used."""

    records: SourceRecords
    problems: Spool[Problem]
    root: Path
    """What picture paths are relative to."""
    layout: str | None = None
    """Of the user's own data, see `data.layouts`."""
    rows: int = 0
    lost: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Of problems that cost something."""
    first: dict[str, Problem] = field(default_factory=dict)
    """By reason, the first of these."""

    def read(self, items: Iterable[SourceRecord | Problem]) -> None:
        """Take the records of a source, whose rows come in order. A record that repeats another is no loss, and no row."""
        for _, group in itertools.groupby(items, key=lambda item: item.row):
            used = lost = False
            for item in group:
                if isinstance(item, SourceRecord):
                    self.records.add(item)
                    used = True
                    continue
                self.problems.append(item)
                if item.dropped:
                    self.reasons[item.reason] += 1
                    self.first.setdefault(item.reason, item)
                    lost |= item.reason != DUPLICATE
            self.rows += used or lost
            self.lost += lost and not used

    def close(self) -> None:
        self.records.close()
        self.problems.close()


@dataclass(frozen=True)
class Texts:
    """Prompts without pictures. rows: records of their source without pictures; lost: those of them that cannot be used."""

    prompts: list[dict[str, Any]]
    problems: list[Problem]
    rows: int
    lost: int


def training_texts(context: StageContext, prompts: int) -> Texts | None:
    """Prompts without pictures beside `prompts` with pictures; None: none are asked for. DataError where there is none to be had."""
    options = context.config.augment
    if not options.text_source:
        return None
    layouts = LayoutReader(pairs=False)
    items = list(read_texts(options.text_source, layouts))
    context.progress.print(f"augment: layout of augment.text_source: {layouts.layout}")
    # Ids of problems are those of the source with pictures, which may call a record alike.
    problems = [replace(item, id=f"{item.id}/{TEXT}") for item in items if isinstance(item, Problem)]
    records = [item for item in items if isinstance(item, TextRecord)]
    lost = sum(problem.dropped and problem.reason != DUPLICATE for problem in problems)
    wanted = round(options.text_share * prompts)
    if not records:
        reasons = named(Counter(problem.reason for problem in problems)) or "all have pictures"
        raise DataError(f"augment.text_source: {options.text_source} has no usable record without a picture ({reasons})")
    if len(records) < wanted:
        context.progress.print(
            f"augment: {len(records):,} prompts without pictures, of {wanted:,} asked for by augment.text_share: "
            f"{options.text_source} has no more"
        )
    return Texts(text_prompts(records, wanted, context.seed), problems, len(records) + lost, lost)


def source_files(source: str) -> list[Path]:
    """What a source's result depends on. DataError where it does not exist."""
    if source == SHAPES:
        return []
    return [existing(source)]


def training_records(context: StageContext) -> Source:
    """The records of the run's data, without those of pictures that are held out. Raises DataError where too many cannot be used."""
    config = context.config
    source = _read(config.data, context.run.folder("augment"), config.seed)
    _check_usable(source, config.data, "data", config.allow_missing)
    if config.holds_out:
        held = hold_out(source.records.pictures, config.data.holdout, source.root)
        source.records.keep(lambda picture: picture not in held)
        if not len(source.records):
            raise DataError(
                f"data source {config.data.source}: all pictures are held out; lower data.holdout or give evaluate.source"
            )
    return source


def check_evaluation_source(context: StageContext) -> None:
    """Raise DataError where most of the user's own evaluation data cannot be used, without making anything of it.

    Pictures inside a dataset would have to be written to be looked at; they cannot be missing.
    """
    source = context.config.evaluate.source
    if source and source != SHAPES and Path(source).suffix.lower() in (".json", ".jsonl"):
        with tempfile.TemporaryDirectory() as folder:
            evaluation_records(context, Path(folder)).close()


def evaluation_records(context: StageContext, folder: Path) -> Source:
    """The records that evaluation prompts are made of, none of a training picture. Raises DataError as `training_records` does."""
    config = context.config
    given = config.evaluate.source or config.data.source
    data = DataConfig(**{**vars(config.data), "source": given, "wrong_answers": 0.0})
    if config.evaluate.source:
        data.image_folder, data.limit = config.evaluate.image_folder, None
    if given == SHAPES:
        data.pictures = max(config.evaluate.per_format.values(), default=1)
    source = _read(data, folder, config.seed + EVALUATION_SEED)
    _check_usable(source, data, "evaluate" if config.evaluate.source else "data", config.allow_missing)
    if given != SHAPES and not config.evaluate.source:
        held = hold_out(source.records.pictures, config.data.holdout, source.root)
        source.records.keep(lambda picture: picture in held)
        if not len(source.records):
            raise DataError("nothing is held out for evaluation (data.holdout is 0); give evaluate.source or evaluate.input")
    return source


def _read(data: DataConfig, folder: Path, seed: int) -> Source:
    path, image_folder = Path(data.source), data.image_folder
    if data.source == SHAPES:
        from mmdpo_trainers.shapes.world import write_sft

        path = folder / "source" / "data.json"
        image_folder = str(folder / "source" / "images")
        if not path.exists():
            try:
                write_sft(
                    folder / "source",
                    pictures=data.pictures,
                    seed=seed,
                    questions_per_picture=data.questions_per_picture,
                    wrong_answers=data.wrong_answers,
                )
            except ValueError as error:
                raise ConfigError(f"data.questions_per_picture: {error}") from error
    root = Path(image_folder) if image_folder else (path if path.is_dir() else path.parent)
    source = Source(SourceRecords(folder), Spool(str(folder)), root.resolve())
    layouts = LayoutReader(data.columns, pairs=False)
    cache = folder / "source_images"
    source.read(read_source(path, image_folder=image_folder, cache=cache, limit=data.limit, layouts=layouts))
    source.layout = layouts.layout if data.source != SHAPES else None
    return source


def _check_usable(source: Source, data: DataConfig, section: str, allow_missing: bool) -> None:
    """Raise DataError where all records cannot be used, or more than half and that is not allowed."""
    remedy = "expected questions about one picture"
    most = source.reasons.most_common(1)
    gone = next((source.first[reason] for reason in ("missing", "outside_image_folder") if most and reason == most[0][0]), None)
    if gone is not None:
        where = f"it is {data.image_folder}" if data.image_folder else "it is unset, so that they are looked for beside the data"
        remedy = f"such as {gone.detail}: set {section}.image_folder to the folder that picture paths are relative to ({where})"
    elif most:
        first = source.first[most[0][0]]
        remedy = f"such as record {first.id}: {first.detail}; {remedy}"
    if not len(source.records):
        raise DataError(f"data source {data.source}: no usable record ({reasons_of(source.reasons)}); {remedy}")
    counts = f"{source.lost:,} of {counted(source.rows, 'record')} cannot be used ({reasons_of(source.reasons)})"
    check_left_out(source.lost / source.rows, allow_missing, f"data source {data.source}: {counts}; {remedy}")


def reasons_of(counts: Mapping[str, int]) -> str:
    """Reasons with their counts, in words."""
    return named(counts) or "it is empty"
