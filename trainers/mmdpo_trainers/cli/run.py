"""`mmdpo run`: a whole run from a configuration."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mmdpo_trainers.cli.flags import ALLOW, add_allow_missing, assigned, check_places, checked, typed, yaml_value
from mmdpo_trainers.config.shipped import config_file
from mmdpo_trainers.config.stages import STAGES
from mmdpo_trainers.config.values import read_yaml
from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.methods import check_method


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    run = commands.add_parser(
        "run",
        help="do, or continue, a whole run from a YAML file",
        description="Do all stages in order. Started again after a kill, it continues where it stopped.",
        epilog="examples:\n  mmdpo run shapes_mia_dpo\n"
        "  mmdpo run my.yaml --set train.args.learning_rate=1e-4 --set augment.num_prompts=2000 --run-dir runs/lr1e-4\n"
        "  mmdpo run my.yaml --restart select      # remove select and everything after it, then continue",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("config", metavar="CONFIG", help="the run's configuration: a YAML file, or the name of a shipped one")
    run.add_argument("--run-dir", metavar="FOLDER", help="the run folder (default: runs/<name>)")
    run.add_argument("--seed", metavar="N", help="seed of every random choice, in place of the file's")
    run.add_argument("--until", metavar="STAGE", choices=STAGES, help=f"stop after this stage: {', '.join(STAGES)}")
    run.add_argument("--restart", metavar="STAGE", help="remove this stage's files and those of later stages first")
    about_set = "replace one value, such as score.layer=8; may be repeated"
    run.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help=about_set)
    add_allow_missing(run)
    run.set_defaults(action=_run)


def _run(options: argparse.Namespace) -> None:
    from mmdpo_trainers.run.pipeline import run_pipeline

    file = config_file(options.config)
    values = read_yaml(file)
    for assignment in options.set:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {assignment}: expected KEY=VALUE, such as --set score.layer=8")
        values = assigned(values, key.split("."), yaml_value(f"--set {key}", text))
    if options.seed is not None:
        values["seed"] = typed("seed", options.seed)
    if options.run_dir is not None:
        values["run_dir"] = options.run_dir
    if hasattr(options, ALLOW):
        values[ALLOW] = True
    values.setdefault("name", Path(options.config).stem)
    config = check_method(checked(values, options.config), options.config)
    check_places(config, file)
    run_pipeline(config, until=options.until, restart=options.restart)
