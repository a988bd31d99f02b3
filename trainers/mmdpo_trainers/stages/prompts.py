"""Multi-image prompts as files of a run: those of stage augment, and those of its evaluation."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.data.left_out import check_left_out, counted, left_out_line, lost
from mmdpo_trainers.data.multi_image import TOO_FEW, Planned, PromptMaker, check_options, plan_prompts, prompt_id
from mmdpo_trainers.data.records import FORMATS, TEXT
from mmdpo_trainers.data.sources import Problem
from mmdpo_trainers.errors import DataError, StageError
from mmdpo_trainers.files.fingerprint import Fingerprint, content_hash
from mmdpo_trainers.files.json_lines import JsonLines, read_jsonl
from mmdpo_trainers.models.families import fixed_grid
from mmdpo_trainers.processes.progress import ProgressTask
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.prompt_sources import Source, Texts, evaluation_records, reasons_of, source_files

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
        with contextlib.closing(evaluation_records(context, context.run.folder("evaluate"))) as source:
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


def write_prompts(
    context: StageContext,
    stage: str,
    source: Source,
    plans: Sequence[tuple[Iterator[Planned], int]],
    *,
    formats: Mapping[str, float],
    singles: bool,
    texts: Texts | None = None,
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
        raise DataError(f"no prompt could be made: {reasons_of(summary['problems'])}. See {folder / 'problems.jsonl'}")
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


def _summarize(folder: Path, source: Source, formats: Sequence[str], texts: Texts | None) -> tuple[dict[str, Any], float]:
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
