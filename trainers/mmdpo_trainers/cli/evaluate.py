"""`mmdpo evaluate` without a run: a model, or an adapter beside its base, on prompts with answers."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from mmdpo_trainers.cli.flags import configuration
from mmdpo_trainers.errors import ConfigError


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of an evaluation without a run, beside the stage's own."""
    parser.add_argument(
        "--adapter", metavar="FOLDER", help="without a run: a PEFT adapter, or a whole model, compared with its base --model"
    )
    parser.add_argument("--json", action="store_true", help="without a run: print JSON in place of a table")


def action(of_run: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """What `mmdpo evaluate` does; of_run: the stage of a run."""

    def act(options: argparse.Namespace) -> None:
        alone = options.adapter is not None or options.run is None
        (_evaluate if alone else of_run)(options)

    return act


def _evaluate(options: argparse.Namespace) -> None:
    given = {"--model": ["model"], "--input": ["evaluate.input", "evaluate.benchmarks"]}
    missing = [
        flag for flag, keys in given.items() if all(getattr(options, key, None) is None for key in keys) and not options.config
    ]
    if missing:
        raise ConfigError(
            "evaluate: give --run FOLDER, the folder of a run, or --adapter FOLDER, --model FOLDER and --input FILE or --benchmarks "
            f"'{{NAME: FILE}}'; {missing[0]} is missing"
        )
    if options.arm is not None:
        raise ConfigError(f"--arm {options.arm}: an evaluation without a run has no arms; leave it out")
    from mmdpo_trainers.run.evaluation import evaluate, folder_for

    folder = Path(options.run) if options.run else folder_for(options.adapter or options.model)
    config = configuration(options, folder / "config.yaml")
    evaluate(
        dataclasses.replace(config, run_dir=str(folder)),
        adapter=None if options.adapter is None else Path(options.adapter).expanduser(),
        restart=options.restart,
        as_json=options.json,
    )
