"""`mmdpo calibrate`: whether, and at which layer, a model's attention tells its right answers from its wrong ones."""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from pathlib import Path
from typing import Any, get_type_hints

from mmdpo_trainers.cli.flags import SHARED, add_allow_missing, add_fields, configuration, parser_of
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.shipped import config_file
from mmdpo_trainers.config.stages import StageKind
from mmdpo_trainers.config.values import read_yaml

_KIND = StageKind(
    about="Find out whether a model's attention tells its right answers from its wrong ones, and at which layer.",
    examples=(
        "calibrate --model llava-1.5-7b-hf --data llava_665k.json --image-folder images --num-prompts 2000",
        "calibrate --model llava-1.5-7b-hf --input my_prompts.jsonl       # prompts of your own, with answers",
        "calibrate --model llava-1.5-7b-hf --responses my_responses.jsonl # with answers of the model's that you have",
        "calibrate --config shapes_mia_dpo                                # the prompts that a run would make",
    ),
)
_MORE = (
    "Makes prompts with several pictures from single-image data with answers (1,000 prompts, unless --num-prompts says otherwise), lets the "
    "model answer them, and records in the same pass how much each layer looks at the asked-about picture. Printed are, for each layer and "
    "format, the area under the ROC curve of that share against right and wrong answers (.5: it says nothing; 1: it tells them apart); the "
    "layer that does it best, chosen on one half of the prompts and measured on the other; and layer and thresholds as lines for a "
    "configuration file. report.html in the folder draws it. Some hundred right and wrong answers of each format are enough. A killed command "
    "continues where it stopped."
)
_FLAGS = {
    "data": ("source", "image_folder", "limit"),
    "augment": ("num_prompts", "formats", "num_images"),
    "generate": ("input", "batch_size", "max_new_tokens", "do_sample"),
    "score": ("best_by", "statistic", "regions"),
    "select": ("match",),
}
_PROMPTS = 1000
"""Prompts that are made where nobody says how many."""


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    about = f"{_KIND.about}\n\n{textwrap.fill(_MORE, 100)}"
    parser = parser_of(commands, "calibrate", _KIND, f"{about}\n\nSettings not given come from --config, or are the defaults.")
    parser.add_argument("--run", metavar="FOLDER", help="the folder it works in (default: runs/calibrate-<model>)")
    parser.add_argument("--config", metavar="CONFIG", help="settings to start from, such as those of a run to come")
    parser.add_argument(
        "--restart", metavar="STAGE", help="remove the files of this stage (augment, generate, score) and later ones first"
    )
    about_responses = "your own responses .jsonl in place of generate/responses.jsonl: prompts, each with `response` and `answer`"
    parser.add_argument("--responses", dest="score.input", metavar="VALUE", default=argparse.SUPPRESS, help=about_responses)
    for section, names in _FLAGS.items():
        add_fields(parser, get_type_hints(RunConfig)[section], section, names)
    add_fields(parser, RunConfig, names=SHARED)
    add_allow_missing(parser)
    parser.set_defaults(action=_calibrate, stage="score")


def _calibrate(options: argparse.Namespace) -> None:
    from mmdpo_trainers.run.calibrate import calibrate

    given = read_yaml(config_file(options.config)) if options.config else {}
    model = getattr(options, "model", None) or given.get("model") or RunConfig().model
    folder = Path(options.run or Path("runs") / f"calibrate-{Path(model).name}")
    config = configuration(options, folder / "config.yaml")
    prompts = config.augment.num_prompts or _PROMPTS
    # The middle layer of a run to come is no answer here.
    config = dataclasses.replace(
        config,
        run_dir=str(folder),
        score=dataclasses.replace(config.score, layer="best"),
        augment=dataclasses.replace(config.augment, num_prompts=prompts),
    )
    calibrate(config, restart=options.restart)
