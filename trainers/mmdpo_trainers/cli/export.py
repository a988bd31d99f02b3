"""`mmdpo export`: flags and help."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from mmdpo_trainers.cli.flags import parser_of
from mmdpo_trainers.config.stages import StageKind

_KIND = StageKind(
    about="Write what a run trained as a whole model that transformers and vLLM read, with a filled model card.",
    examples=(
        "export runs/mine my-model",
        "export runs/mine my-model --arm sft --dtype bfloat16     # a control arm's",
        "export my-adapter my-model --base llava-1.5-7b-hf        # an adapter without its run",
        "export runs/mine my-adapter --adapter-only               # for PEFT, and vLLM's --enable-lora",
        "export runs/mine my-model --push-to-hub me/my-model --private",
        "export runs/mine my-model --lmms-eval my-task            # and its evaluation prompts as a task of lmms-eval",
    ),
)
_DESCRIPTION = (
    "An adapter is merged into the weights of its base; the folder has the names, processor, chat template and generation settings that the "
    "base was published with. Read back by transformers alone, it is compared with base and adapter, and refused where they differ by more than "
    "rounding. The folder is there whole, or not at all. There has to be memory and disk for the model once."
)


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = parser_of(commands, "export", _KIND, f"{_KIND.about}\n\n{textwrap.fill(_DESCRIPTION, 100)}")
    parser.add_argument("source", metavar="RUN_OR_ADAPTER", help="a run folder, or that of a PEFT adapter")
    parser.add_argument("out", metavar="OUT", help="the folder that is written; new or empty")
    parser.add_argument("--arm", metavar="NAME", help="of a run: a control experiment, in place of the main one")
    parser.add_argument("--base", metavar="FOLDER", help="the model that an adapter belongs to; a run knows its own")
    parser.add_argument("--base-name", metavar="ID", help="what the card calls the base, such as its id on the Hub")
    parser.add_argument("--dtype", default="auto", help="auto (the base's own), float32, bfloat16, float16 or float64")
    parser.add_argument("--device", default="auto", help="where weights are merged and compared: auto, cpu, cuda or cuda:N")
    parser.add_argument("--adapter-only", action="store_true", help="the adapter by itself, with processor and card")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file of weights (default: 5GB)")
    parser.add_argument("--no-verify", action="store_true", help="do not read the folder back and compare it")
    parser.add_argument(
        "--push-to-hub", metavar="ID", help="upload the folder; the token is that of `hf auth login`, or HF_TOKEN"
    )
    parser.add_argument("--private", action="store_const", const=True, help="make a new repository on the Hub a private one")
    parser.add_argument(
        "--lmms-eval", metavar="DIR", help="write evaluation prompts to this folder too, as a task of lmms-eval on local files"
    )
    parser.add_argument(
        "--lmms-eval-input", metavar="FILE", help="prompts with answers (.jsonl) for --lmms-eval, in place of the run's own"
    )
    parser.set_defaults(action=_export)


def _export(options: argparse.Namespace) -> None:
    from mmdpo_trainers.run.export.source import find_source
    from mmdpo_trainers.run.export.write import Options, export

    source = find_source(options.source, options.out, arm=options.arm, base=options.base, base_name=options.base_name)
    export(
        source,
        options.out,
        Options(
            dtype=options.dtype,
            device=options.device,
            adapter_only=options.adapter_only,
            max_shard_size=options.max_shard_size,
            verify=not options.no_verify,
            push_to_hub=options.push_to_hub,
            private=options.private,
            lmms_eval=options.lmms_eval,
            lmms_eval_input=options.lmms_eval_input,
        ),
    )
