"""Published benchmarks in an evaluation: their records made once, answered before and after training, marked as each declares it.

`evaluate/benchmarks/<key>-<digest>/` has the records of one (`prompts.jsonl`, `problems.jsonl`, `images/`); beside the other answers of a
moment are `benchmark-<key>.jsonl`, the answers with their marks, and `benchmarks.json`, which says what they are of.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mmdpo_trainers.answers.attention_ratios import ratios_at, resolve_layer
from mmdpo_trainers.answers.config_only import check_prompts
from mmdpo_trainers.answers.transformers_engine import generate_responses
from mmdpo_trainers.config.sections.evaluation import EvaluateConfig
from mmdpo_trainers.data.conversation import conversation_of
from mmdpo_trainers.data.left_out import check_left_out, left_out_line, lost
from mmdpo_trainers.data.records import relative_images
from mmdpo_trainers.data.sources import Problem
from mmdpo_trainers.errors import ConfigError, DataError
from mmdpo_trainers.files.atomic import read_json, write_atomic
from mmdpo_trainers.files.fingerprint import Fingerprint, content_hash
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.processes import ranks
from mmdpo_trainers.report.benchmarks import LIST, answers_file, benchmarks_of, figures_of
from mmdpo_trainers.stages.batches import Record, run_batches
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.engine_answers import Questions, answered
from mmdpo_trainers.stages.judging import check_judge, judge_benchmarks, judge_files
from mmdpo_trainers.stages.models import LazyModel
from mmdpo_trainers.suites import Suite, suite_named
from mmdpo_trainers.suites.reading import files_of, layouts_of, read

COMMON = "common.json"
"""What marking needs beside the records of a benchmark."""

_TRIED = 20
"""Rows of a benchmark that are read before any work."""
_PLACES = ("missing", "outside_image_folder", "video")
"""Reasons of problems that a folder given mends."""


def benchmark_marks(options: EvaluateConfig) -> dict[str, str]:
    """Benchmark -> a hash of its files' names and contents: what answers depend on, beside the settings and pictures in other files. Of a judge
    the same, as `judge …`."""
    marks = {key: _mark(suite_named(key), Path(path)) for key, path in options.benchmarks.items()}
    return marks | {name: content_hash(path) for name, path in judge_files(options).items()}


def _mark(suite: Suite, path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    files = [*files_of(suite, path), *(suite.beside(path) if suite.beside else ())]
    named = [f"{os.path.relpath(file, folder)}\0{content_hash(file)}\n" for file in files]
    return hashlib.sha256("".join(named).encode()).hexdigest()


def check_benchmarks(context: StageContext) -> None:
    """Raise ConfigError or DataError, before any work, for a benchmark that there is not, or files that are not of it."""
    options = context.options
    if context.rewards and options.benchmarks:
        raise ConfigError("evaluate.benchmarks: a reward model rates answers and gives none; leave it out")
    for key, path in options.benchmarks.items():
        if not key.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"evaluate.benchmarks: {key!r} becomes a file name: letters, digits, _ and - only")
        suite = suite_named(key)
        layouts_of(suite, Path(path))
        if suite.beside is not None:
            suite.beside(Path(path))
    check_judge(options)
    for name in ("benchmark_images", "benchmark_suffix"):
        for key, value in getattr(options, name).items():
            if key not in options.benchmarks:
                raise ConfigError(
                    f"evaluate.{name}: {key!r} is none of evaluate.benchmarks, {', '.join(options.benchmarks) or 'none'}"
                )
            if name == "benchmark_images" and not Path(value).is_dir():
                raise ConfigError(
                    f"evaluate.benchmark_images.{key}: {value} is not a folder; give the one with the benchmark's pictures"
                )


def try_benchmarks(context: StageContext) -> None:
    """Raise DataError where the first rows of a benchmark all lack their pictures: an evaluation may come after hours of training."""
    for key, path in context.options.benchmarks.items():
        with tempfile.TemporaryDirectory() as folder:
            first = list(itertools.islice(_items(context, key, suite_named(key), Path(folder)), _TRIED))
        gone = [each for each in first if isinstance(each, Problem) and each.reason in _PLACES]
        if gone and len(gone) == len(first):
            raise DataError(
                f"{path}: its first {len(first)} rows lack their pictures, such as {gone[0].detail}. Give the folder that its paths are "
                f"relative to: evaluate.benchmark_images: {{{key}: FOLDER}}"
            )


def benchmark_questions(context: StageContext) -> list[Questions]:
    """All that the benchmarks ask, for an engine that answers before attention is measured."""
    found = []
    for key in context.options.benchmarks:
        suite = suite_named(key)
        longest = context.options.benchmark_tokens or suite.max_new_tokens
        about = f"{suite.title}: answers {context.moment or ''}".strip()
        found.append(Questions(key, _records(context, key, suite)[1], longest, about))
    return found


def _records(context: StageContext, key: str, suite: Suite) -> tuple[Path, list[Record]]:
    """The folder of a benchmark's records, and the records."""
    folder = Path(ranks.on_rank_0(functools.partial(_prepare, context, key, suite)))
    records = [
        {**record, "images": [os.path.normpath(folder / image) for image in record["images"]]}
        for record in read_jsonl(folder / "prompts.jsonl")
    ]
    check_prompts(context.model, records, context.date)
    return folder, records


def answer_benchmarks(
    context: StageContext,
    model: LazyModel,
    chosen: Mapping[str, int],
    given: Mapping[str, Mapping[str, Record]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Answer and mark every benchmark of the settings; what of it the stage's summary says, on rank 0. given: by benchmark, answers by an
    engine."""
    found: dict[str, Any] = {}
    common: dict[str, dict[str, Any]] = {}
    for key in context.options.benchmarks:
        suite = suite_named(key)
        folder, records = _records(context, key, suite)

        common[key] = dict(read_json(folder / COMMON, missing={}))

        def work(number: int, batch: Sequence[Record], suite: Suite = suite, key: str = key) -> list[dict[str, Any]]:
            return answer_batch(model, batch, suite, context, chosen, common[key], given.get(key))

        most = max(record["num_images"] for record in records)
        run_batches(
            context,
            answers_file(key),
            records,
            max(1, context.options.batch_size // max(1, most)),
            work,
            f"{suite.title} {context.moment or ''}".strip(),
        )
        if ranks.is_rank_0():
            made = context.run.summary(folder.relative_to(context.run.path).as_posix())
            found[key] = described(suite) | {name: made[name] for name in ("records", "lost", "note") if name in made}
    if context.options.judge.source == "model":
        model.release()
    judge = judge_benchmarks(context, common)
    if not ranks.is_rank_0() or not found:
        return {}
    if judge:
        said = {name: judge[name] for name in ("name", "source", "settings")}
        own = context.options.judge.templates
        found = {
            key: {**each, "judge": {**said, "template": key in own}} if each["judged"] else each for key, each in found.items()
        }
    write_atomic(context.folder / LIST, found)
    _, answers = benchmarks_of(context.folder)
    figures = {key: figures_of(answers[key], found[key]) for key in found}
    return {"benchmarks": figures, **({"judge": judge} if judge else {})}


def answer_batch(
    model: LazyModel,
    batch: Sequence[Record],
    suite: Suite,
    context: StageContext,
    chosen: Mapping[str, int],
    common: Mapping[str, Any] = MappingProxyType({}),
    given: Mapping[str, Record] | None = None,
) -> list[dict[str, Any]]:
    """Greedy answers with what was read out of each and its marks; with several pictures the attention that each of them got.

    `attention`: mass per picture, as in scores; with `target` also `ratio`, as of other prompts. `responses`: of a conversation all answers,
    of which `response` is the last. common: what marking needs beside the records. given: see `answered`.
    """
    options, score = context.options, context.config.score
    several = any(record["num_images"] > 1 for record in batch)
    layer = resolve_layer(model().image_layers, score.layer, chosen, "sequence") if several else 0
    asked = [{**record, "target": record["target"] or 0} if record["images"] else record for record in batch]
    answers = answered(
        model,
        asked,
        given,
        max_new_tokens=options.benchmark_tokens or suite.max_new_tokens,
        record={**score.recording, "layer": layer} if several else None,
    )
    if suite.further is not None:
        answers = _conversations(model(), asked, answers, suite, options)
    results = []
    for record, answer in zip(batch, answers, strict=True):
        recorded = answer.pop("recorded", None)
        looked: dict[str, Any] = {}
        if recorded is not None and record["num_images"] > 1:
            ratios = ratios_at({**record, "target": record["target"] or 0}, recorded, score.statistic, layer)
            looked = {"attention": ratios["attention"], "ratio": None if record["target"] is None else ratios["ratio"]}
        marked: dict[str, Any] = {}
        if suite.mark is not None:
            said, marks = suite.mark({**record, "common": common}, answer["response"])
            marked = {"said": said, "marks": marks}
        results.append({**answer, **marked, **looked})
    return results


def _conversations(
    loaded: LoadedModel, records: Sequence[Record], answers: Sequence[dict[str, Any]], suite: Suite, options: EvaluateConfig
) -> list[dict[str, Any]]:
    """The answers with those to the turns that follow: each is asked behind the model's own answers."""
    assert suite.further is not None
    found: list[dict[str, Any]] = [{**answer, "responses": [answer["response"]]} for answer in answers]
    while True:
        going = []
        for place, answer in enumerate(found):
            prompt = None if "stopped" in answer else suite.further(records[place], answer["responses"])
            if prompt is None:
                continue
            record = {**records[place], "prompt": list(prompt)}
            try:
                # What a model wrote may hold tokens of its own chat format.
                loaded.texts.check_conversation(record["id"], conversation_of(record))
            except DataError as error:
                answer["stopped"] = str(error)
            else:
                going.append((place, record))
        if not going:
            return found
        said = generate_responses(
            loaded, [record for _, record in going], max_new_tokens=options.benchmark_tokens or suite.max_new_tokens
        )
        for (place, _), answer in zip(going, said, strict=True):
            found[place] = {**answer, "responses": [*found[place]["responses"], answer["response"]]}


def described(suite: Suite) -> dict[str, Any]:
    """What the page and the tables have to know of a benchmark."""
    figures = {
        name: {
            "label": each.label,
            "kind": each.kind,
            "lower_is_better": each.lower_is_better,
            "of_units": each.of_units,
            "sum_of": dict(each.sum_of),
            "plus": each.plus,
        }
        for name, each in suite.figures.items()
    }
    return {
        "suite": suite.name,
        "title": suite.title,
        "paper": suite.paper,
        "cited": suite.cited,
        "mean_of": suite.mean_of,
        "figures": figures,
        "judged": suite.judging is not None,
    }


def _prepare(context: StageContext, key: str, suite: Suite) -> str:
    """The folder of a benchmark's records, made where they are not there yet."""
    options = context.options
    path, images = Path(options.benchmarks[key]), options.benchmark_images.get(key)
    parts = {
        "suite": suite.name,
        "files": _mark(suite, path),
        "images": images,
        "suffix": options.benchmark_suffix.get(key, suite.suffix),
        "max_pixels": context.config.data.max_pixels,
    }
    fingerprint = Fingerprint(json.loads(json.dumps(parts)))
    name = f"evaluate/benchmarks/{key}-{fingerprint.digest[:8]}"
    if context.run.stage_is_done(name, fingerprint):
        return str(context.run.path / name)
    folder = context.run.begin_stage(name, fingerprint)
    records: list[Record] = []
    problems: list[Problem] = []
    with context.run.clock(name), context.progress.task(f"{suite.title}: records", folder=folder) as task:
        for item in _items(context, key, suite, folder / "images"):
            if isinstance(item, Problem):
                problems.append(item)
            else:
                records.append({**item, "images": relative_images(item["images"], folder, context.run.path)})
            task.advance()
        summary = _counted(records, problems)
        _write_lines(folder / "problems.jsonl", [problem.to_json() for problem in problems])
        _check(suite, path, folder, summary, problems, context.config.allow_missing)
        if suite.common is not None:
            common = suite.common(path)
            write_atomic(folder / COMMON, common)
            summary |= {"note": suite.note(common)} if suite.note else {}
        _write_lines(folder / "prompts.jsonl", records)
    context.run.finish_stage(name, fingerprint, summary)
    if line := left_out_line(summary):
        context.progress.print(f"{suite.title}: {line}; see {folder / 'problems.jsonl'}")
    return str(folder)


def _items(context: StageContext, key: str, suite: Suite, cache: Path) -> Iterator[Record | Problem]:
    options = context.options
    images = options.benchmark_images.get(key)
    return read(
        suite,
        Path(options.benchmarks[key]),
        images=Path(images) if images else None,
        cache=cache,
        suffix=options.benchmark_suffix.get(key),
        max_pixels=context.config.data.max_pixels,
    )


def _counted(records: Sequence[Record], problems: Sequence[Problem]) -> dict[str, Any]:
    dropped = Counter(problem.reason for problem in problems if problem.dropped)
    return {"records": len(records), **lost(len(records) + sum(dropped.values()), dropped)}


def _check(
    suite: Suite, path: Path, folder: Path, summary: Mapping[str, Any], problems: Sequence[Problem], allow_missing: bool
) -> None:
    loss = summary.get("lost")
    if not loss and summary["records"]:
        return
    if loss is None:
        raise DataError(f"{path} has no row of {suite.title}; get the file anew")
    most = max(loss["reasons"], key=lambda reason: loss["reasons"][reason])
    first = next(problem for problem in problems if problem.dropped and problem.reason == most)
    said = f"{path}: {left_out_line(summary)}, such as {first.id}: {first.detail}. Each is in {folder / 'problems.jsonl'}"
    if not summary["records"]:
        raise DataError(said)
    check_left_out(loss["records"] / loss["of"], allow_missing, said)


def _write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
