"""Who rates answers: the truth, a file, a judge behind an endpoint, a local model. All are a `Rater`.

Imported by training, stages and run; imports the engines beside it and what is below.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from mmdpo_trainers.answers.raters.exact import ExactRater
from mmdpo_trainers.answers.raters.file import FileRater
from mmdpo_trainers.answers.raters.judge import Judge
from mmdpo_trainers.answers.raters.rating import Rater, Rating, Surroundings
from mmdpo_trainers.config.sections.rating import RateConfig
from mmdpo_trainers.errors import ConfigError

__all__ = ["Judge", "Rater", "Rating", "Surroundings", "check_rater", "rater_of"]


def rater_of(options: RateConfig, surroundings: Surroundings) -> Rater:
    """The rater that `rate.source` names. Raises ConfigError or DataError where its settings or files will not do."""
    check_rater(options)
    if options.source == "exact":
        return ExactRater(options)
    if options.source == "file":
        return FileRater(options)
    from mmdpo_trainers.answers.raters.replies import KeptReplies

    if options.source == "endpoint":
        from mmdpo_trainers.answers.raters.endpoint import Endpoint as Place
    else:
        from mmdpo_trainers.answers.raters.local import LocalModel as Place  # type: ignore[assignment]
    kept = KeptReplies(surroundings.folder, Path(options.replies) if options.replies else None)
    return Judge(options, Place(options, surroundings), kept)


def check_rater(options: RateConfig) -> None:
    """Raise ConfigError for settings of `rate` that cannot be, before a stage is begun."""
    for name, source in (("file", "file"), ("judge", "model")):
        if options.source == source and not getattr(options, name):
            raise ConfigError(f"rate.{name}: expected a path with rate.source: {source}, got none")
    for name in ("file", "judge", "replies", "check_pairs"):
        path = getattr(options, name)
        if path and not Path(path).exists():
            raise ConfigError(f"rate.{name}: {path} does not exist; mend the path, or leave it out")
    if options.source == "endpoint":
        from mmdpo_trainers.answers.raters.endpoint import check_endpoint

        check_endpoint(options)
    if options.source == "model" and options.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError("rate.engine: vllm is not installed here; pip install 'mmdpo-kernels[vllm]', or set it to transformers")
    if options.source in ("endpoint", "model"):
        from mmdpo_trainers.answers.raters.prompts import JudgePrompts

        JudgePrompts(options)
    if options.source == "reward_model":
        raise ConfigError("rate.source: reward_model is not available in this version; choose exact, file, endpoint or model")
