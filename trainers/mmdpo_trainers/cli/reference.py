"""`mmdpo reference`: the reference model's log-probabilities of a run's pairs."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

import yaml

from mmdpo_trainers.cli.flags import add_section, configuration, parser_of, run_path
from mmdpo_trainers.config.stages import StageKind
from mmdpo_trainers.errors import ConfigError, RunFolderError
from mmdpo_trainers.processes import ranks

_KIND = StageKind(
    about="Compute the reference model's log-probabilities of a run's pairs, once for all trainings on them.",
    examples=(
        "reference --run runs/mine --model llava-1.5-7b-hf",
        "reference --config my.yaml --arm mdpo          # the run folder is the file's",
        "reference --run runs/mine --refresh            # throw away what another model left, and compute anew",
    ),
)
_MORE = (
    "They are kept beside the pairs, in <pairs>.reference.jsonl (beside a file outside the run folder, in <pairs>.<model>.reference.jsonl), and "
    "read by every training on them: steps then run the policy alone. Training computes by itself what is not there. A killed command "
    "continues where it stopped; records that changed are computed again; a file from another reference model is refused."
)


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    about = textwrap.fill(f"{_KIND.about} {_MORE}", 100)
    parser = parser_of(commands, "reference", _KIND, f"{about}\n\nSettings are those of `mmdpo train`.")
    parser.add_argument("--run", metavar="FOLDER", help="the run folder; not needed with --config")
    parser.add_argument("--config", metavar="CONFIG", help="settings to start from, in place of FOLDER/config.yaml")
    parser.add_argument("--refresh", action="store_true", help="throw away what the file holds, and compute everything anew")
    parser.add_argument("--arm", metavar="NAME", help="a control experiment of the configuration, in place of the main run")
    add_section(parser, "train")
    parser.set_defaults(stage="reference", action=_reference)


def _reference(options: argparse.Namespace) -> None:
    from mmdpo_trainers.run.pipeline import held, set_threads
    from mmdpo_trainers.stages.context import StageContext
    from mmdpo_trainers.stages.folder import RunFolder

    if not options.run and not options.config:
        raise ConfigError("reference: give --run FOLDER, or --config CONFIG, whose run folder is then used")
    folder = Path(options.run) if options.run else run_path(options.config)
    run = RunFolder(folder)
    config = configuration(options, run.path / "config.yaml")
    context = StageContext(run=run, config=config.for_arm(options.arm), stage="train", arm=options.arm)
    if not context.pairs.exists():
        raise RunFolderError(
            f"{context.pairs} does not exist: run the stages before train, or give your own preference data with --input"
        )
    set_threads(config.threads)
    # Not earlier: a mistake on the command line is to be answered at once.
    from mmdpo_trainers.run import reference

    with held(run), ranks.failing():
        summary = reference.run(context, refresh=options.refresh)
    if ranks.is_rank_0():
        print(yaml.safe_dump({"reference": summary}, sort_keys=False, allow_unicode=True), end="")
