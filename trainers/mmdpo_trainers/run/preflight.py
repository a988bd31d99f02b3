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
from mmdpo_trainers.methods import Method
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
        if context.stage == "generate" and context.options.engine == "vllm":
            from mmdpo_trainers.answers.vllm_engine import check_vllm

            check_vllm(context.config)
        if context.stage == "train":
            check_train_args(context)
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
        ("measures", method.measures, ("answers", "held_out")),
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
    """Raise ConfigError for `train.args` that PreferenceConfig does not have or does not take."""
    from mmdpo_trainers.run.model_preflight import training_settings
    from mmdpo_trainers.training.arguments import ARGUMENTS
    from mmdpo_trainers.training.config import PreferenceConfig

    where = f"arms.{context.arm}.train.args" if context.arm else "train.args"
    known = [f.name for f in dataclasses.fields(PreferenceConfig) if f.init]
    hints = get_type_hints(PreferenceConfig)
    for name, value in context.options.args.items():
        if name in ARGUMENTS:
            continue  # for PreferenceConfig to take, or to say what is in its place
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(f"{where}: PreferenceConfig has no field {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")
        # transformers takes a learning rate that is a text, and fails with it in the first step.
        if _is_number(hints[name]):
            validated(hints[name], value, where=where, name=name)
    training_settings(context, range(1))


def _is_number(hint: Any) -> bool:
    return {hint, *get_args(hint)} & {int, float} != set() and set(get_args(hint)) <= {int, float, type(None)}


def _check_files(context: StageContext) -> None:
    names = ["input", *(["replay_source"] if context.stage == "train" and context.options.replay else [])]
    for name in names:
        path = getattr(context.options, name, None)
        if path and not Path(path).exists():
            raise ConfigError(f"{context.stage}.{name}: {path} does not exist; give one of your own files, or leave it out")


def _check_evaluation(context: StageContext) -> None:
    from mmdpo_trainers.data.multi_image import check_options
    from mmdpo_trainers.stages.prompts import evaluation_inputs

    if context.options.input:
        return
    config = context.config
    if context.method.evaluation_prompts == "pairs":
        _check_preferences(context)
        return
    check_options(config.augment, config.evaluate.per_format, max_pixels=config.data.max_pixels, setting="evaluate.per_format")
    evaluation_inputs(context)


def _check_preferences(context: StageContext) -> None:
    config = context.config
    if config.train.input:
        raise ConfigError(
            "train.input: pairs given to train leave none for evaluation; give them as pairs.source, or prompts as evaluate.input"
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
        from mmdpo_trainers.stages.prompts import check_evaluation_source

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
