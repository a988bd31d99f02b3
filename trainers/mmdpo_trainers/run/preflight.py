"""What can be known to fail before a run starts: looked at first, because the stage it would stop may be hours away."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mmdpo_trainers.config.shipped import SHIPPED
from mmdpo_trainers.config.stages import STAGES
from mmdpo_trainers.config.values import validated
from mmdpo_trainers.data.left_out import ALLOW
from mmdpo_trainers.errors import ConfigError, DataError
from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.methods import Method, online_settings
from mmdpo_trainers.stages.context import StageContext, stage_module


def check_run(contexts: Sequence[StageContext]) -> None:
    """Raise MmdpoError for settings and files that one of these stages would refuse once its turn has come.

    One process looks for all of a launch, and makes no process group.
    """
    if any(STAGES[context.stage].model for context in contexts):
        from mmdpo_trainers.models.loading import resolve_device

        resolve_device(contexts[0].config.device or "auto")
    for context in contexts:
        _check_files(context)
        if context.stage == "pairs":
            stage_module("pairs").inputs(context)
        if context.stage in ("generate", "evaluate") and context.options.engine == "vllm":
            from mmdpo_trainers.answers.vllm_engine import check_vllm

            check_vllm(context.config, context.stage)
        if context.stage == "generate" and context.options.engine == "server":
            from mmdpo_trainers.answers.server_engine import check_server

            check_server(context.config)
        if context.stage == "rate":
            from mmdpo_trainers.training.reward.rater import check_rater

            check_rater(context.options)
        if context.stage == "generate":
            _check_answers(contexts)
        if context.stage == "rank":
            _check_attributes(context)
        if context.stage == "train":
            check_train_args(context)
            _check_sampling(context)
        if context.stage == "hallucinate":
            _check_hallucinate(context)
        if context.stage == "evaluate":
            _check_evaluation(context)
        if context.stage == "report":
            _check_seeds(context)
    if any(STAGES[context.stage].model and context.stage != "report" for context in contexts):
        from mmdpo_trainers.run.model_preflight import check_model

        check_model(contexts)
    for context in contexts:
        _check_data(context)


def check_declaration(method: Method) -> None:
    """Raise ConfigError where a method names a stage, a table or a section of the page that there is not, or lacks a stage of every run."""
    from mmdpo_trainers.report.sections import SECTIONS
    from mmdpo_trainers.run.tables import TABLES

    for what, named, known in (
        ("stages", method.stages, STAGES),
        ("tables", method.tables, TABLES),
        ("page", method.page, SECTIONS),
        ("optional", tuple(method.optional), method.stages),
        ("measures", method.measures, ("answers", "held_out", "rewards")),
    ):
        unknown = [name for name in named if name not in known]
        if unknown:
            raise ConfigError(f"method {method.name}: {what}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    missing = [stage for stage in ("train", "evaluate", "report") if stage not in method.stages[1:]]
    if missing or list(method.stages) != sorted(method.stages, key=list(STAGES).index):
        raise ConfigError(
            f"method {method.name}: stages: expected one that makes pairs, then train, evaluate and report, in the order of "
            f"{', '.join(STAGES)}; got {', '.join(method.stages)}"
        )


def check_train_args(context: StageContext) -> None:
    """Raise ConfigError for `train.args` that the trainer's settings do not have or do not take."""
    from mmdpo_trainers.run.model_preflight import training_settings
    from mmdpo_trainers.training.arguments import ARGUMENTS
    from mmdpo_trainers.training.trainers import TRAINERS

    settings = TRAINERS[context.method.trainer].config_class
    where = f"arms.{context.arm}.train.args" if context.arm else "train.args"
    known = [f.name for f in dataclasses.fields(settings) if f.init]
    hints = get_type_hints(settings)
    for name, value in context.options.args.items():
        if name in ARGUMENTS:
            continue  # for the trainer's settings to take, or to say what is in its place
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"{where}: {settings.__name__} has no field {name!r}{f'; did you mean {near[0]!r}?' if near else ''}"
            )
        # transformers takes a learning rate that is a text, and fails with it in the first step.
        if _is_number(hints[name]):
            validated(hints[name], value, where=where, name=name)
    training_settings(context, range(1))


def _check_sampling(context: StageContext) -> None:
    """Raise ConfigError for settings of answers sampled in training, or of their rating, that cannot be."""
    options, rating = online_settings(context.config), context.config.rate
    if not options.alpha:
        return
    if context.method.trainer == "reward_model":
        raise ConfigError("online.alpha: a reward model learns from pairs that exist, and samples nothing; leave it at 0")
    from mmdpo_trainers.run.model_preflight import training_settings
    from mmdpo_trainers.training.online.choice import check_options
    from mmdpo_trainers.training.online.pairs import check_fit
    from mmdpo_trainers.training.reward.rater import check_rater

    check_rater(rating)
    if rating.source == "file":
        raise ConfigError(
            "rate.source: no file has ratings of answers that are sampled in training; choose exact, endpoint, model or reward_model"
        )
    try:
        check_options(options)
        check_fit(options, training_settings(context, range(1)))
    except ValueError as error:
        raise ConfigError(f"arms.{context.arm}: {error}" if context.arm else str(error)) from error


def _is_number(hint: Any) -> bool:
    return {hint, *get_args(hint)} & {int, float} != set() and set(get_args(hint)) <= {int, float, type(None)}


def _check_answers(contexts: Sequence[StageContext]) -> None:
    from mmdpo_trainers.answers.response import check_num_answers

    options = contexts[0].config.generate
    check_num_answers(options)
    stages = {context.stage for context in contexts}
    if options.num_answers > 1 and "score" in stages:
        raise ConfigError(f"generate.num_answers: score looks at one answer a prompt, got {options.num_answers}; set it to 1")
    if options.num_answers == 1 and "rank" in stages:
        raise ConfigError(
            "generate.num_answers: rank compares several answers to a prompt, got 1; set it to 2 or more, with generate.do_sample "
            "(the paper: 4 at generate.temperature 0.7)"
        )


def _check_attributes(context: StageContext) -> None:
    rank, known = context.options, context.config.rate.attributes
    where = f"arms.{context.arm}.rank" if context.arm else "rank"
    for setting, names in (("weights", rank.weights), ("ask", rank.ask)):
        if not rank.input and (unknown := [name for name in names if name not in known]):
            near = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; rate that too, or leave it out"
            raise ConfigError(f"{where}.{setting}: {unknown[0]!r} is none of rate.attributes, {', '.join(known)}{hint}")


def _check_files(context: StageContext) -> None:
    names = ["input", "text_source", *(["replay_source"] if context.stage == "train" and context.options.replay else [])]
    for name in names:
        path = getattr(context.options, name, None)
        if path and not Path(path).exists():
            raise ConfigError(f"{context.stage}.{name}: {path} does not exist; give one of your own files, or leave it out")


def _check_hallucinate(context: StageContext) -> None:
    stage_module("hallucinate").inputs(context)
    embedding = context.options.embedding
    if embedding and not Path(embedding).is_dir():
        raise ConfigError(f"hallucinate.embedding: {embedding} is not a folder; give a local model folder, or leave it out")


def _check_evaluation(context: StageContext) -> None:
    from mmdpo_trainers.data.multi_image import check_options
    from mmdpo_trainers.stages.benchmarks import check_benchmarks, try_benchmarks
    from mmdpo_trainers.stages.prompts import evaluation_inputs

    check_benchmarks(context)
    if context.moment == "before" and not context.config.allow_missing:
        try_benchmarks(context)
    if context.options.input:
        if context.rewards:
            stage_module("evaluate").inputs(context)
        return
    config = context.config
    if context.method.evaluation_prompts == "pairs":
        _check_preferences(context)
        return
    check_options(config.augment, config.evaluate.per_format, max_pixels=config.data.max_pixels, setting="evaluate.per_format")
    evaluation_inputs(context)


def _check_preferences(context: StageContext) -> None:
    config = context.config
    for stage in context.method.stages[1 : context.method.stages.index("evaluate")]:
        if getattr(getattr(config, stage), "input", None):
            raise ConfigError(
                f"{stage}.input: pairs given to {stage} leave none for evaluation; give them as pairs.source, or prompts as evaluate.input"
            )
    if config.pairs.held_out == 0 and config.pairs.source not in SHIPPED:
        raise ConfigError("pairs.held_out: nothing is left to evaluate on; raise it, or give prompts as evaluate.input")


def _check_data(context: StageContext) -> None:
    """Data that an early stage does not look at, and a later one would find gone."""
    if (
        context.method.evaluation_prompts == "augmented"
        and context.stage == "evaluate"
        and context.moment == "before"
        and not context.options.input
    ):
        from mmdpo_trainers.stages.prompt_sources import check_evaluation_source

        check_evaluation_source(context)
    path = getattr(context.options, "input", None)
    if path and context.stage in ("generate", "score", "evaluate") and not context.config.allow_missing:
        from mmdpo_trainers.stages.batches import missing_images, read_records

        records = read_records(Path(path), "records")
        if gone := missing_images(records):
            name, picture = next(iter(gone.items()))
            raise DataError(
                f"{context.stage}.input: {len(gone):,} of {len(records):,} records of {path} lack a picture, such as record {name}: "
                f"{picture} is not a file; mend the paths, which are relative to the file's folder; or {ALLOW}"
            )


def _check_seeds(context: StageContext) -> None:
    for folder in context.options.seeds:
        summary = Path(folder) / "summary.json"
        if not summary.is_file() or "before" not in read_json(summary):
            raise ConfigError(
                f"report.seeds: {folder} is not the folder of a finished run with held-out pairs; finish it first, or leave it out"
            )
