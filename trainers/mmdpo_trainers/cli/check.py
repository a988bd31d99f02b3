"""`mmdpo check`: a model folder against transformers itself."""

from __future__ import annotations

import argparse
from typing import Any

from mmdpo_trainers.cli.flags import add_fields, parser_of, typed
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.stages import StageKind

_KIND = StageKind(
    about="Check a model folder: logits, picture tokens, attention, trees and gradients against transformers itself.",
    examples=(
        "check --model llava-1.5-7b-hf",
        "check --model my-model --dtype float32 --only parity,tree --json",
        "check --model my-model --quantization '{load_in_4bit: true}'",
    ),
)


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = parser_of(commands, "check", _KIND, f"{_KIND.about} Exit code 2 where one fails.")
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="a whole Hugging Face checkpoint: its folder, or its id on the hub"
    )
    add_fields(parser, RunConfig, names=("revision",))
    parser.add_argument("--adapter", metavar="FOLDER", help="a PEFT adapter of it, merged into whole weights")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's own), float32, bfloat16, float16 or float64")
    add_fields(parser, RunConfig, names=("quantization",))
    parser.add_argument("--only", metavar="NAMES", help="some of the checks, with commas between them")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.set_defaults(action=_check)


def _check(options: argparse.Namespace) -> None:
    from mmdpo_trainers.checks.command import check_command

    check_command(
        options.model,
        revision=getattr(options, "revision", None),
        adapter=options.adapter,
        device=options.device,
        dtype=options.dtype,
        quantization=typed("quantization", options.quantization) if hasattr(options, "quantization") else None,
        only=options.only,
        as_json=options.json,
    )
