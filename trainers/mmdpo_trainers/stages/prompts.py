"""Multi-image prompts as files of a run: those of stage augment, and those of its evaluation."""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmdpo_trainers.config.sections.data import DataConfig
from mmdpo_trainers.data.held_out import hold_out
from mmdpo_trainers.data.layouts import LayoutReader
from mmdpo_trainers.data.left_out import check_left_out, counted, left_out_line, lost, named
from mmdpo_trainers.data.multi_image import TOO_FEW, Planned, PromptMaker, check_options, plan_prompts, prompt_id, text_prompts
from mmdpo_trainers.data.records import FORMATS, TEXT
from mmdpo_trainers.data.source_records import SourceRecords
from mmdpo_trainers.data.sources import DUPLICATE, Problem, SourceRecord, TextRecord, read_source, read_texts
from mmdpo_trainers.data.streams import existing
from mmdpo_trainers.errors import ConfigError, DataError, StageError
from mmdpo_trainers.files.fingerprint import Fingerprint, content_hash
from mmdpo_trainers.files.json_lines import JsonLines, read_jsonl
from mmdpo_trainers.files.spool import Spool
from mmdpo_trainers.models.families import fixed_grid
from mmdpo_trainers.processes.progress import ProgressTask
from mmdpo_trainers.stages.context import StageContext

SHAPES = "shapes"
EVALUATION_SEED = 1_000_003
"""Added to the run's seed for the evaluation pictures of the built-in world, which are thus never the training pictures."""

_TRAINING_ONLY = ("formats", "per_record", "num_prompts", "text_source", "text_share", "wrong_answers")
_FLUSH_PROMPTS = 128
_FLUSH_PROBLEMS = 1024
_FLUSH_SECONDS = 5.0
_AHEAD = 256
"""Prompts whose pictures are looked at side by side."""


def build_evaluation_prompts(context: StageContext) -> Path:
    """Make `evaluate/prompts.jsonl` with the code that makes training prompts; done once, continued after a kill.

    Its pictures are not those of training: new ones of the built-in world, `evaluate.source`, or those held out of `data.source`.
    Returns the user's own file where `evaluate.input` names one.
    """
    if context.config.evaluate.input:
        return context.evaluation_prompts
    config = context.config
    check_options(config.augment, config.evaluate.per_format, max_pixels=config.data.max_pixels, setting="evaluate.per_format")
    parts = {
        "seed": config.seed,
        "data": {key: value for key, value in vars(config.data).items() if key not in _TRAINING_ONLY},
        "augment": {key: value for key, value in vars(config.augment).items() if key not in _TRAINING_ONLY},
        "per_format": config.evaluate.per_format,
        "source": [config.evaluate.source, config.evaluate.image_folder],
        "files": {path.name: content_hash(path) for path in evaluation_inputs(context)},
    }
    fingerprint = Fingerprint(json.loads(json.dumps(parts)))
    if not context.run.stage_is_done("evaluate", fingerprint):
        context.run.begin_stage("evaluate", fingerprint)
        formats = config.evaluate.per_format
        with contextlib.closing(_evaluation_records(context, context.run.folder("evaluate"))) as source:
            plans = [(plan_prompts(source.records, config.seed, {name: 1.0}), count) for name, count in formats.items()]
            summary = write_prompts(context, "evaluate", source, plans, formats=formats, singles=False)
        context.run.finish_stage("evaluate", fingerprint, summary)
        if line := left_out_line(summary):
            context.progress.print(f"evaluate: {line}; see {context.run.path / 'evaluate' / 'problems.jsonl'}")
    return context.evaluation_prompts


def evaluation_inputs(context: StageContext) -> list[Path]:
    """Files that the evaluation prompts depend on."""
    config = context.config
    if config.evaluate.input:
        return [Path(config.evaluate.input)]
    files = source_files(config.evaluate.source or config.data.source)
    if config.augment.patch_grid is None and need_regions(config.evaluate.per_format):
        files.append(context.model / "config.json")
    return files


def source_files(source: str) -> list[Path]:
    if source == SHAPES:
        return []
    return [existing(source)]


def write_prompts(
    context: StageContext,
    stage: str,
    source: Source,
    plans: Sequence[tuple[Iterator[Planned], int]],
    *,
    formats: Mapping[str, float],
    singles: bool,
    texts: _Texts | None = None,
) -> dict[str, Any]:
    folder, records = context.run.folder(stage), source.records
    if need_regions(formats) and not context.config.augment.square:
        _refuse_centre_crop(context.model)
    maker = PromptMaker(
        records.pictures,
        context.config.augment,
        seed=context.seed,
        patch_grid=_patch_grid(context, formats),
        folder=folder,
        root=context.run.path,
        max_pixels=context.config.data.max_pixels,
    )
    total = sum(count for _, count in plans)
    with _Writer(folder, singles=singles) as writer, contextlib.closing(maker.looks):
        writer.report(source.problems)
        layout = f"layout: {source.layout}; " if source.layout else ""
        context.progress.print(f"{stage}: {layout}{counted(total, 'prompt')} from {counted(len(records), 'question')}")
        with context.progress.task(f"{stage}: prompts", total, folder=folder) as task:
            for plan, count in plans:
                _make(plan, count, len(records), maker, writer, task)
        if texts is not None:
            writer.report(texts.problems)
            for prompt in texts.prompts:
                if prompt["id"] not in writer:
                    writer.add(prompt, None)
    summary, share = _summarize(folder, source, [name for name, wanted in formats.items() if wanted], texts)
    if not any(summary["prompts"].values()):
        raise DataError(f"no prompt could be made: {_reasons(summary['problems'])}. See {folder / 'problems.jsonl'}")
    check_left_out(
        share,
        context.config.allow_missing,
        f"{stage}: {left_out_line(summary)}. See {folder / 'problems.jsonl'} and mend the data",
    )
    return summary


def _make(plan: Iterator[Planned], count: int, records: int, maker: PromptMaker, writer: _Writer, task: ProgressTask) -> None:
    """Make `count` prompts of a plan; stops early where a whole round over the records gives none."""
    made = barren = 0
    while made < count and barren < records:
        planned = list(itertools.islice(plan, min(_AHEAD, count - made)))
        maker.prepare([each for each in planned if prompt_id(*each) not in writer])
        for record, format, variant in planned:
            if barren >= records:
                break
            if prompt_id(record, format, variant) in writer:
                prompt: dict[str, Any] | None = {}
            else:
                prompt, problems = maker.make(record, format, variant)
                writer.report(problems)
                if prompt is not None:
                    single = maker.make(record, "single", 0)[0] if variant == 0 and writer.singles is not None else None
                    writer.add(prompt, single)
            if prompt is None:
                barren += 1
            else:
                made, barren = made + 1, 0
                task.advance()
    writer.flush()


class _Writer:
    """The stage's files. Problems and singles go to disk before the prompts they belong to, so none is lost to a kill between."""

    def __init__(self, folder: Path, *, singles: bool) -> None:
        self.prompts = JsonLines(folder / "prompts.jsonl")
        self.problems = JsonLines(folder / "problems.jsonl", key="key")
        self.singles = JsonLines(folder / "singles.jsonl") if singles else None
        self._prompts: list[dict[str, Any]] = []
        self._singles: dict[str, dict[str, Any]] = {}
        self._problems: dict[str, Problem] = {}
        self._flushed = time.monotonic()

    def __contains__(self, id: str) -> bool:
        return id in self.prompts

    def report(self, problems: Iterable[Problem]) -> None:
        for problem in problems:
            if problem.key not in self.problems:
                self._problems.setdefault(problem.key, problem)
            if len(self._problems) >= _FLUSH_PROBLEMS:
                self.flush()

    def add(self, prompt: dict[str, Any], single: dict[str, Any] | None) -> None:
        self._prompts.append(prompt)
        if single is not None and self.singles is not None and single["id"] not in self.singles:
            self._singles[single["id"]] = single
        if len(self._prompts) >= _FLUSH_PROMPTS or time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self.problems.append([problem.to_json() for problem in self._problems.values()])
        if self.singles is not None:
            self.singles.append(self._singles.values())
        self.prompts.append(self._prompts)
        self._prompts, self._singles, self._problems = [], {}, {}
        self._flushed = time.monotonic()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self.flush()
        for file in (self.prompts, self.problems, self.singles):
            if file is not None:
                file.close()


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
class _Texts:
    """Prompts without pictures. rows: records of their source without pictures; lost: those of them that cannot be used."""

    prompts: list[dict[str, Any]]
    problems: list[Problem]
    rows: int
    lost: int


def training_texts(context: StageContext, prompts: int) -> _Texts | None:
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
    return _Texts(text_prompts(records, wanted, context.seed), problems, len(records) + lost, lost)


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
            _evaluation_records(context, Path(folder)).close()


def _evaluation_records(context: StageContext, folder: Path) -> Source:
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
        raise DataError(f"data source {data.source}: no usable record ({_reasons(source.reasons)}); {remedy}")
    counts = f"{source.lost:,} of {counted(source.rows, 'record')} cannot be used ({_reasons(source.reasons)})"
    check_left_out(source.lost / source.rows, allow_missing, f"data source {data.source}: {counts}; {remedy}")


def _reasons(counts: Mapping[str, int]) -> str:
    return named(counts) or "it is empty"


def _summarize(folder: Path, source: Source, formats: Sequence[str], texts: _Texts | None) -> tuple[dict[str, Any], float]:
    """Counted from the files, so a resumed run counts what all its attempts wrote; and the share of records that was lost.

    formats: those asked for. Of the records that prompts were to be made of, those are lost that none was made of.
    """
    prompts: Counter[str] = Counter()
    sizes: dict[str, Counter[str]] = {}
    made: set[str] = set()
    for prompt in read_jsonl(folder / "prompts.jsonl"):
        if prompt["format"] != TEXT:
            made.add(prompt["source_id"])
        prompts[prompt["format"]] += 1
        sizes.setdefault(prompt["format"], Counter())[str(prompt["num_images"])] += 1
    dropped: Counter[str] = Counter()
    handled: Counter[str] = Counter()
    barren: set[str] = set()
    for problem in read_jsonl(folder / "problems.jsonl"):
        (dropped if problem["dropped"] else handled)[problem["reason"]] += 1
        if problem["dropped"] and problem["reason"] != TOO_FEW and problem["id"] not in made:
            barren.add(problem["id"])
    # Problems are those of all records; what was to be made into prompts are those of the source.
    lost_on_the_way = sum(id in barren for id in source.records.ids()) if barren else 0
    kept = (1 - source.lost / source.rows) * (1 - lost_on_the_way / max(1, lost_on_the_way + len(made)))
    summary = {
        **({"layout": source.layout} if source.layout else {}),
        "records": len(source.records),
        "prompts": {name: prompts[name] for name in (*FORMATS, TEXT) if name in prompts or name in formats},
        "num_images": {name: dict(sorted(counts.items())) for name, counts in sizes.items()},
        "problems": dict(sorted(dropped.items())),
        "handled": dict(sorted(handled.items())),
        **lost(source.rows + (texts.rows if texts else 0), dropped, source.lost + lost_on_the_way + (texts.lost if texts else 0)),
    }
    return summary, 1 - kept


def need_regions(formats: Mapping[str, float]) -> bool:
    return bool(formats.get("grid") or formats.get("pip"))


def _refuse_centre_crop(model: Path) -> None:
    """Boxes are those of the whole picture: a processor that crops the centre of an oblong one moves what lies at them."""
    # A model that cannot be read is the affair of the stages that load it.
    with contextlib.suppress(OSError, ValueError, AttributeError, KeyError, TypeError):
        if fixed_grid(json.loads((model / "config.json").read_text(encoding="utf-8"))) is None:
            # Tiles have the size that is cropped.
            return
    for file in (model / "processor_config.json", model / "preprocessor_config.json"):
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if config.get("image_processor", config).get("do_center_crop"):
            raise StageError(f"{file}: this model sees the centre of an oblong picture only; set augment.square to true")


def _patch_grid(context: StageContext, formats: Mapping[str, float]) -> tuple[int, int] | None:
    """Patch rows and columns of any picture: the configured ones, or those of the model's vision tower; None where each picture
    has its own, so that its `box` alone says where the target is."""
    if context.config.augment.patch_grid is not None:
        return context.config.augment.patch_grid
    if not need_regions(formats):
        return None
    file = context.model / "config.json"
    remedy = "set augment.patch_grid to [rows, columns]"
    try:
        return fixed_grid(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise StageError(f"{file} does not exist; give --model a whole model folder, or {remedy}") from error
    except (AttributeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise StageError(f"{file} does not say how many patches a picture has ({error!r}); {remedy}") from error
