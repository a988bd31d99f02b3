"""Who rates answers: the truth, a file, a judge behind an endpoint, a local model. All are a `Rater`.

Imported by training, stages and run; imports the engines beside it and what is below.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from mmdpo_trainers.answers.raters.exact import ExactRater
from mmdpo_trainers.answers.raters.file import FileRater
from mmdpo_trainers.answers.raters.judge import AskedModel, Form, Judge, Problem
from mmdpo_trainers.answers.raters.rating import Rater, Rating, Surroundings
from mmdpo_trainers.config.sections.rating import AskedConfig, RateConfig
from mmdpo_trainers.errors import ConfigError

__all__ = [
    "AskedModel",
    "Form",
    "Judge",
    "Problem",
    "Rater",
    "Rating",
    "Surroundings",
    "asked_model",
    "check_asked",
    "check_rater",
    "rater_of",
]


def rater_of(options: RateConfig, surroundings: Surroundings) -> Rater:
    """The rater that `rate.source` names, but for a reward model (`training.reward.rater.rater_of` knows all).

    Raises ConfigError or DataError where its settings or files will not do.
    """
    check_rater(options)
    if options.source == "reward_model":
        raise ValueError("rate.source: a reward model is trained one; call mmdpo_trainers.training.reward.rater.rater_of")
    if options.source == "exact":
        return ExactRater(options)
    if options.source == "file":
        return FileRater(options)
    return Judge(options, asked_model(options, surroundings))


def asked_model(options: AskedConfig, surroundings: Surroundings, earlier: Sequence[Path] = ()) -> AskedModel:
    """The model behind an endpoint or in a local folder that settings name, asked in words.

    earlier: files of replies beside the settings' own, of which nothing is asked again.
    """
    from mmdpo_trainers.answers.raters.replies import KeptReplies

    if options.source == "endpoint":
        from mmdpo_trainers.answers.raters.endpoint import Endpoint as Place
    else:
        from mmdpo_trainers.answers.raters.local import LocalModel as Place  # type: ignore[assignment]
    given = [Path(options.replies)] if options.replies else []
    return AskedModel(options, Place(options, surroundings), KeptReplies(surroundings.folder, [*given, *earlier]))


def check_rater(options: RateConfig) -> None:
    """Raise ConfigError for settings of `rate` that cannot be, before a stage is begun."""
    for name, source in (("file", "file"), ("judge", "reward_model")):
        if options.source == source and not getattr(options, name):
            raise ConfigError(f"rate.{name}: expected a path with rate.source: {source}, got none")
    check_asked(options)
    _check_paths(options, "file", "check_pairs")
    if options.source in ("endpoint", "model"):
        from mmdpo_trainers.answers.raters.prompts import JudgePrompts

        JudgePrompts(options)


def check_asked(options: AskedConfig) -> None:
    """Raise ConfigError for settings of a model that is asked that cannot be, before anything is asked."""
    if options.source == "model" and not options.judge:
        raise ConfigError(f"{options.where}.judge: expected a path with {options.where}.source: model, got none")
    _check_paths(options, "judge", "replies")
    if options.source == "endpoint":
        from mmdpo_trainers.answers.raters.endpoint import check_endpoint

        check_endpoint(options)
    if options.source == "model" and options.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"{options.where}.engine: vllm is not installed here; pip install 'mmdpo-kernels[vllm]', or set it to transformers"
        )


def _check_paths(options: AskedConfig, *names: str) -> None:
    for name in names:
        path = getattr(options, name)
        if path and not Path(path).exists():
            raise ConfigError(f"{options.where}.{name}: {path} does not exist; mend the path, or leave it out")
