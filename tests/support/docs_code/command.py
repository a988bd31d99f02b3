"""Arguments of the `mmdpo` command, through the command itself, up to the work: that is replaced by looking at the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.run.preflight import check_train_args
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder

_WORK = (
    "mmdpo_trainers.run.calibrate.calibrate",
    "mmdpo_trainers.run.reference.run",
    "mmdpo_trainers.run.evaluation.evaluate",
    "mmdpo_trainers.run.export.source.find_source",
    "mmdpo_trainers.run.export.write.export",
    "mmdpo_trainers.checks.command.check_command",
    "mmdpo_trainers.cli.env.print_environment",
)


def without_work(patch: pytest.MonkeyPatch) -> None:
    """Replace what the command would do by a look at what it was told to do."""
    for name in _WORK:
        patch.setattr(name, lambda *args, **kwargs: {})
    patch.setattr("mmdpo_trainers.run.pipeline.run_pipeline", lambda config, **kwargs: check_settings(config))
    patch.setattr("mmdpo_trainers.run.pipeline.run_stage", _look)


def call(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """AssertionError with the command's own words where it does not take these arguments."""
    try:
        code = cli.main(arguments)
    except SystemExit as stopped:  # argparse's; 0 is --help
        code = int(stopped.code or 0)
    said = capsys.readouterr().err
    assert code == 0, f"mmdpo {' '.join(arguments)}: {said}"


def check_settings(config: RunConfig) -> None:
    """Raise ConfigError for `train.args` of a run, or of one of its arms, that the trainer does not take."""
    for name, each in {None: config, **{name: config.for_arm(name) for name in config.arms}}.items():
        check_train_args(StageContext(run=RunFolder(Path(config.run_path)), config=each, stage="train", arm=name))


def _look(context: StageContext, config: Any = None) -> dict[str, Any]:
    if context.stage == "train":
        check_train_args(context)
    return {}
