"""Answers to benchmarks that a judge marks: asked once all answers of a moment are there, every reply kept.

Beside a moment's answers to such a benchmark are `judged-<key>.jsonl`, what the judge said of each, and `judge/replies.jsonl`, its replies. What
another moment or arm of the run was told already, such as of an answer that training did not change, is not asked again.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.answers.raters import AskedModel, Problem, Surroundings, asked_model, check_asked
from mmdpo_trainers.answers.raters.replies import costs, reply_files
from mmdpo_trainers.config.sections.evaluation import EvaluateConfig
from mmdpo_trainers.data.left_out import check_left_out
from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.processes import ranks
from mmdpo_trainers.report.benchmarks import answers_file, judged_file
from mmdpo_trainers.stages.batches import Record, run_batches
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.suites import Suite, suite_named
from mmdpo_trainers.suites.judging import Judging, Prompts

FOLDER = "judge"
_IN_FLIGHT = 4
"""Answers to a batch for each request that an endpoint is sent at a time: it has nothing to do where a batch ends."""


def judged_suites(options: EvaluateConfig) -> dict[str, Suite]:
    """Key -> benchmark, of those in the settings that a judge marks."""
    named = {key: suite_named(key) for key in options.benchmarks}
    return {key: suite for key, suite in named.items() if suite.judging is not None}


def check_judge(options: EvaluateConfig) -> None:
    """Raise ConfigError, before any work, where a benchmark needs a judge and there is none, or one with settings that cannot be."""
    judge, suites = options.judge, judged_suites(options)
    for key in judge.templates:
        if key not in suites:
            raise ConfigError(
                f"evaluate.judge.templates: {key!r} is none of evaluate.benchmarks that a judge marks, {', '.join(suites) or 'none'}"
            )
    if not suites:
        return
    if judge.source == "none":
        raise ConfigError(
            f"evaluate.benchmarks: a judge marks {', '.join(suites)}; say which as evaluate.judge.source, endpoint or model, or leave "
            f"{'it' if len(suites) == 1 else 'them'} out"
        )
    check_asked(judge)
    for key, suite in suites.items():
        _prompts(options, key, suite).check()


def judge_files(options: EvaluateConfig) -> dict[str, Path]:
    """What judgements depend on beside the settings: templates of the user's own, and a judge in a local folder."""
    judge = options.judge
    if not judged_suites(options):
        return {}
    found = {f"judge, template of {key}": Path(path) for key, path in judge.templates.items()}
    return found | ({"judge": Path(judge.judge)} if judge.source == "model" and judge.judge else {})


def judge_benchmarks(context: StageContext, common: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mark the answers of this moment to every judged benchmark; what the stage's summary says of the judge, on rank 0.

    common: key -> what marking needs beside the records. Raises DataError where most answers to a benchmark could not be judged, unless
    `allow_missing`.
    """
    options = context.options
    suites = judged_suites(options)
    if not suites:
        return {}
    folder = context.folder / FOLDER
    ranks.on_rank_0(functools.partial(folder.mkdir, exist_ok=True))
    surroundings = Surroundings(
        folder=folder,
        device=context.device,
        dtype=context.config.dtype,
        # A judge's template has arguments of its own.
        date=context.date.with_arguments(None),
        allow_missing=context.config.allow_missing,
    )
    with contextlib.closing(asked_model(options.judge, surroundings, _earlier(context, folder))) as model:
        for key, suite in suites.items():
            _judge(context, model, key, suite, common[key])
        identity = dict(model.identity)
    if not ranks.is_rank_0():
        return {}
    for key, suite in suites.items():
        _check(context, key, suite)
    judge, took = options.judge, costs(folder)
    name = judge.endpoint.model if judge.source == "endpoint" else Path(str(judge.judge)).name
    if took:
        words = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in took.items())
        context.progress.print(f"judge {name}, {context.moment or ''}: {words}")
    return {"source": judge.source, "name": name, "settings": identity, "costs": took}


def _judge(context: StageContext, model: AskedModel, key: str, suite: Suite, common: Mapping[str, Any]) -> None:
    judging, prompts, options = suite.judging, _prompts(context.options, key, suite), context.options.judge
    assert judging is not None
    answers = {str(answer["id"]): {**answer, "common": common} for answer in read_jsonl(context.folder / answers_file(key))}

    def work(number: int, batch: Sequence[Record]) -> list[dict[str, Any]]:
        return _judged([answers[record["id"]] for record in batch], model, judging, prompts)

    slim = [{"id": name, "unit": answer["unit"], "groups": answer["groups"], "images": []} for name, answer in answers.items()]
    size = (
        max(options.batch_size, _IN_FLIGHT * options.endpoint.concurrency) if options.source == "endpoint" else options.batch_size
    )
    run_batches(context, judged_file(key), slim, size, work, f"{suite.title} {context.moment or ''}, judge")


def _judged(answers: Sequence[Mapping[str, Any]], model: AskedModel, judging: Judging, prompts: Prompts) -> list[dict[str, Any]]:
    """What the judge said of each answer, what that is worth, and what kept it from saying anything."""
    texts = [prompts.texts(answer, answer) for answer in answers]
    about = [{"id": answer["id"]} for answer, asked in zip(answers, texts, strict=True) for _ in asked]
    found = iter(model.replies(about, [text for asked in texts for text in asked], judging.form, judging.parse))
    results = []
    for answer, asked in zip(answers, texts, strict=True):
        replies = [next(found) for _ in asked]
        problems = [{"reason": each.reason, "detail": each.detail} for each in replies if isinstance(each, Problem)]
        if "stopped" in answer:
            problems.append({"reason": "turn_not_asked", "detail": answer["stopped"]})
        values = [None if isinstance(each, Problem) else each for each in replies]
        said, marks = judging.marked(answer, answer, values)
        results.append({"judged": values, "said": said, "marks": marks or None, **({"problems": problems} if problems else {})})
    return results


def _check(context: StageContext, key: str, suite: Suite) -> None:
    lines = list(read_jsonl(context.folder / judged_file(key)))
    without = [line for line in lines if line["marks"] is None]
    if not without:
        return
    first = next(problem for line in without for problem in line["problems"])
    reasons = dict(Counter(problem["reason"] for line in without for problem in line["problems"][:1]))
    such = f"{without[0]['id']}: {first['detail']}"
    said = f"{suite.title}: {len(without):,} of {len(lines):,} answers were not judged ({reasons}), such as {such}"
    check_left_out(len(without) / len(lines), context.config.allow_missing, f"{said}. See {context.folder / judged_file(key)}")
    context.progress.print(f"{said}; they count in no figure")


def _prompts(options: EvaluateConfig, key: str, suite: Suite) -> Prompts:
    assert suite.judging is not None
    return Prompts(suite.judging, f"evaluate.judge.templates.{key}", options.judge.templates.get(key))


def _earlier(context: StageContext, folder: Path) -> list[Path]:
    """Files of replies of the run's other evaluations."""
    places = ("evaluate/*", "evaluate/own/*", "arms/*/evaluate/*")
    others = {path for place in places for path in context.run.path.glob(f"{place}/{FOLDER}")} - {folder}
    return [file for other in sorted(others) for file in reply_files(other)]
