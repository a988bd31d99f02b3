"""`mmdpo <stage>`: one stage of a run folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from mmdpo_trainers.cli import evaluate
from mmdpo_trainers.cli.flags import add_fields, add_section, configuration, parser_of
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.sections.data import DataConfig
from mmdpo_trainers.config.sections.online import OnlineConfig
from mmdpo_trainers.config.stages import STAGES
from mmdpo_trainers.errors import RunFolderError
from mmdpo_trainers.processes import ranks


def add(commands: Any) -> None:
    """Add the commands to the parser's, one a stage."""
    for stage in STAGES:
        _add(commands, stage)


def _add(commands: Any, stage: str) -> None:
    kind = STAGES[stage]
    parser = parser_of(
        commands, stage, kind, f"{kind.about} Settings not given come from FOLDER/config.yaml, or are the defaults."
    )
    alone = stage == "evaluate"
    parser.add_argument("--run", required=not alone, metavar="FOLDER", help="the run folder; created if it does not exist")
    parser.add_argument("--config", metavar="CONFIG", help="settings to start from, in place of FOLDER/config.yaml")
    parser.add_argument("--restart", action="store_true", help="remove this stage's files and those of later stages first")
    parser.add_argument("--arm", metavar="NAME", help="a control experiment of the configuration, in place of the main run")
    if alone:
        parser.add_argument("--moment", choices=("before", "after"), default="after", help="the model before or after training")
        evaluate.add_flags(parser)
    if stage == "augment":
        add_fields(parser, DataConfig, "data")
    if stage == "train":
        add_fields(parser, OnlineConfig, "online")
    add_section(parser, stage)
    parser.set_defaults(action=evaluate.action(_stage) if alone else _stage, stage=stage)


def _stage(options: argparse.Namespace) -> None:
    from mmdpo_trainers.processes.progress import Progress
    from mmdpo_trainers.run.pipeline import held, restart_from, run_stage, set_threads
    from mmdpo_trainers.stages.context import StageContext
    from mmdpo_trainers.stages.folder import RunFolder

    run = RunFolder(options.run)
    config = configuration(options, run.path / "config.yaml")
    if options.stage == "report" and not any((run.path / stage).is_dir() for stage in STAGES if stage != "report"):
        raise RunFolderError(f"{run.path} holds no run to report on; give --run the folder of one")
    set_threads(config.threads)
    context = StageContext(
        run=run,
        config=config.for_arm(options.arm),
        stage=options.stage,
        moment=getattr(options, "moment", None),
        arm=options.arm,
        own=_own_evaluation(options, config),
        progress=Progress(),
    )
    with held(run), ranks.failing():
        if options.restart and context.own:
            ranks.on_rank_0(lambda: run.remove(context.name))
        elif options.restart:
            ranks.on_rank_0(lambda: restart_from(run, context.name, tuple(config.arms)))
        # Settings of an evaluation beside the run's are not the run's.
        summary = run_stage(context, config=None if context.own else config)
    if not ranks.is_rank_0():
        return
    shown = {key: value for key, value in summary.items() if key != "fingerprint"}
    shown |= {"trained": str(context.trained)} if options.stage == "train" else {}
    print(yaml.safe_dump({context.name: shown}, sort_keys=False, allow_unicode=True), end="")


def _own_evaluation(options: argparse.Namespace, config: RunConfig) -> str | None:
    """Name of the evaluation that `mmdpo evaluate --input FILE` or `--benchmarks` makes: one beside the run's, whose answers stay as they
    are."""
    if options.stage != "evaluate":
        return None
    if getattr(options, "evaluate.input", None) is not None and config.evaluate.input:
        return Path(config.evaluate.input).stem
    return "benchmarks" if getattr(options, "evaluate.benchmarks", None) is not None else None
