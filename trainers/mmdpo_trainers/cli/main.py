"""The `mmdpo` command: a whole run from a YAML file, or one stage at a time. Flags come from the configuration dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from rich.console import Console

from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.sections.data import DataConfig
from mmdpo_trainers.config.sections.online import OnlineConfig
from mmdpo_trainers.config.stages import STAGES, StageKind
from mmdpo_trainers.config.values import parse_yaml, read_yaml, type_name, validated
from mmdpo_trainers.errors import ConfigError, MmdpoError, RunFolderError
from mmdpo_trainers.methods import METHODS, check_method
from mmdpo_trainers.processes import notices, ranks

_SHARED = ("method", "model", "seed", "threads", "dtype", "quantization", "device")
_ALLOW = "allow_missing"

_COMMANDS = {
    "reference": StageKind(
        about="Compute the reference model's log-probabilities of a run's pairs, once for all trainings on them.",
        examples=(
            "reference --run runs/mine --model llava-1.5-7b-hf",
            "reference --config my.yaml --arm mdpo          # the run folder is the file's",
            "reference --run runs/mine --refresh            # throw away what another model left, and compute anew",
        ),
    ),
    "calibrate": StageKind(
        about="Find out whether a model's attention tells its right answers from its wrong ones, and at which layer.",
        examples=(
            "calibrate --model llava-1.5-7b-hf --data llava_665k.json --image-folder images --num-prompts 2000",
            "calibrate --model llava-1.5-7b-hf --input my_prompts.jsonl       # prompts of your own, with answers",
            "calibrate --model llava-1.5-7b-hf --responses my_responses.jsonl # with answers of the model's that you have",
            "calibrate --config configs/shapes_mia_dpo.yaml                   # the prompts that a run would make",
        ),
    ),
    "check": StageKind(
        about="Check a model folder: logits, picture tokens, attention, trees and gradients against transformers itself.",
        examples=(
            "check --model llava-1.5-7b-hf",
            "check --model my-model --dtype float32 --only parity,tree --json",
            "check --model my-model --quantization '{load_in_4bit: true}'",
        ),
    ),
}
"""Commands that are about a model or a run and are no stage, described as stages are."""
_REFERENCE = (
    "They are kept beside the pairs, in <pairs>.reference.jsonl, and read by every training on them: steps then run the policy alone. "
    "Training computes by itself what is not there. A killed command continues where it stopped; records that changed are computed "
    "again; a file from another reference model is refused."
)
_CALIBRATE = (
    "Makes prompts with several pictures from single-image data with answers (1,000 prompts, unless --num-prompts says otherwise), lets the "
    "model answer them, and records in the same pass how much each layer looks at the asked-about picture. Printed are, for each layer and "
    "format, the area under the ROC curve of that share against right and wrong answers (.5: it says nothing; 1: it tells them apart); the "
    "layer that does it best, chosen on one half of the prompts and measured on the other; and layer and thresholds as lines for a "
    "configuration file. report.html in the folder draws it. Some hundred right and wrong answers of each format are enough. A killed command "
    "continues where it stopped."
)
_CALIBRATED = {
    "data": ("source", "image_folder", "limit"),
    "augment": ("num_prompts", "formats", "num_images"),
    "generate": ("input", "batch_size", "max_new_tokens", "do_sample"),
    "score": ("best_by", "statistic", "regions"),
    "select": ("match",),
}
_PROMPTS = 1000
"""Prompts that `mmdpo calibrate` makes where nobody says how many."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `mmdpo`. Returns the exit code: 0; 2 for an error of the user's, printed in one line; 130 if interrupted."""
    options = _parser().parse_args(arguments)
    try:
        with notices.aside(), ranks.failing():
            options.action(options)
    except MmdpoError as error:
        _print_error(error)
        return 2
    except KeyboardInterrupt:
        if ranks.is_rank_0():
            print("mmdpo: interrupted; the same command continues the run", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        _print_error(error, "; once that is put right, the same command continues")
        return 2
    return 0


def _print_error(error: Exception, remedy: str = "") -> None:
    """In one line. Of a launch, the process that failed first says it, and the first process, whose output people read."""
    first = ranks.fail(error)
    if first.rank == ranks.rank() or ranks.is_rank_0():
        print(f"mmdpo: error: {' '.join(str(error).split())}{remedy}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmdpo",
        description="Preference training for models that read several pictures.",
        epilog="examples:\n  mmdpo run configs/shapes_mia_dpo.yaml\n  mmdpo env\n  mmdpo score --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_run(commands)
    for stage in STAGES:
        _add_stage(commands, stage)
    _add_reference(commands)
    _add_calibrate(commands)
    _add_check(commands)
    about = "print versions, devices and kernel backends"
    env = commands.add_parser("env", help=about, description=f"{about[0].upper()}{about[1:]}.")
    env.set_defaults(action=_env)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="do, or continue, a whole run from a YAML file",
        description="Do all stages in order. Started again after a kill, it continues where it stopped.",
        epilog="examples:\n  mmdpo run configs/shapes_mia_dpo.yaml\n"
        "  mmdpo run my.yaml --set train.args.learning_rate=1e-4 --set augment.num_prompts=2000 --run-dir runs/lr1e-4\n"
        "  mmdpo run my.yaml --restart select      # remove select and everything after it, then continue",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("config", metavar="CONFIG.yaml", help="the run's configuration; see configs/shapes_mia_dpo.yaml")
    run.add_argument("--run-dir", metavar="FOLDER", help="the run folder (default: runs/<name>)")
    run.add_argument("--seed", metavar="N", help="seed of every random choice, in place of the file's")
    run.add_argument("--until", metavar="STAGE", choices=STAGES, help=f"stop after this stage: {', '.join(STAGES)}")
    run.add_argument("--restart", metavar="STAGE", help="remove this stage's files and those of later stages first")
    about_set = "replace one value, such as score.layer=8; may be repeated"
    run.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help=about_set)
    _add_allow_missing(run)
    run.set_defaults(action=_run)


def _add_stage(commands: Any, stage: str) -> None:
    parser = _parser_of(
        commands, stage, f"{STAGES[stage].about} Settings not given come from FOLDER/config.yaml, or are the defaults."
    )
    parser.add_argument("--run", required=True, metavar="FOLDER", help="the run folder; created if it does not exist")
    parser.add_argument("--config", metavar="CONFIG.yaml", help="settings to start from, in place of FOLDER/config.yaml")
    parser.add_argument("--restart", action="store_true", help="remove this stage's files and those of later stages first")
    parser.add_argument("--arm", metavar="NAME", help="a control experiment of the configuration, in place of the main run")
    if stage == "evaluate":
        parser.add_argument("--moment", choices=("before", "after"), default="after", help="the model before or after training")
    if stage == "augment":
        _add_fields(parser, DataConfig, "data")
    if stage == "train":
        _add_fields(parser, OnlineConfig, "online")
    _add_section(parser, stage)
    parser.set_defaults(action=_stage, stage=stage)


def _add_reference(commands: Any) -> None:
    about = f"{_COMMANDS['reference'].about} {_REFERENCE}"
    parser = _parser_of(commands, "reference", f"{textwrap.fill(about, 100)}\n\nSettings are those of `mmdpo train`.")
    parser.add_argument("--run", metavar="FOLDER", help="the run folder; not needed with --config")
    parser.add_argument("--config", metavar="CONFIG.yaml", help="settings to start from, in place of FOLDER/config.yaml")
    parser.add_argument("--refresh", action="store_true", help="throw away what the file holds, and compute everything anew")
    parser.add_argument("--arm", metavar="NAME", help="a control experiment of the configuration, in place of the main run")
    _add_section(parser, "train")
    parser.set_defaults(stage="reference", action=_reference)


def _add_calibrate(commands: Any) -> None:
    about = f"{_COMMANDS['calibrate'].about}\n\n{textwrap.fill(_CALIBRATE, 100)}"
    parser = _parser_of(commands, "calibrate", f"{about}\n\nSettings not given come from --config, or are the defaults.")
    parser.add_argument("--run", metavar="FOLDER", help="the folder it works in (default: runs/calibrate-<model>)")
    parser.add_argument("--config", metavar="CONFIG.yaml", help="settings to start from, such as those of a run to come")
    parser.add_argument(
        "--restart", metavar="STAGE", help="remove the files of this stage (augment, generate, score) and later ones first"
    )
    about_responses = "your own responses .jsonl in place of generate/responses.jsonl: prompts, each with `response` and `answer`"
    parser.add_argument("--responses", dest="score.input", metavar="VALUE", default=argparse.SUPPRESS, help=about_responses)
    for section, names in _CALIBRATED.items():
        _add_fields(parser, get_type_hints(RunConfig)[section], section, names)
    _add_fields(parser, RunConfig, names=_SHARED)
    _add_allow_missing(parser)
    parser.set_defaults(action=_calibrate, stage="score")


def _add_check(commands: Any) -> None:
    parser = _parser_of(commands, "check", f"{_COMMANDS['check'].about} Exit code 2 where one fails.")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="the folder of a whole Hugging Face checkpoint")
    parser.add_argument("--adapter", metavar="FOLDER", help="a PEFT adapter of it, merged into whole weights")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's own), float32, bfloat16, float16 or float64")
    _add_fields(parser, RunConfig, names=("quantization",))
    parser.add_argument("--only", metavar="NAMES", help="some of the checks, with commas between them")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.set_defaults(action=_check)


def _parser_of(commands: Any, name: str, description: str) -> argparse.ArgumentParser:
    kind = {**STAGES, **_COMMANDS}[name]
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=kind.about[0].lower() + kind.about[1:].rstrip("."),
        description=description,
        epilog="examples:\n" + "\n".join(f"  mmdpo {example}" for example in kind.examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _add_section(parser: argparse.ArgumentParser, stage: str) -> None:
    """A flag for each field of a stage's section, and for those that all stages have."""
    _add_fields(parser, get_type_hints(RunConfig)[stage], stage)
    _add_fields(parser, RunConfig, names=_SHARED)
    _add_allow_missing(parser)


def _add_allow_missing(parser: argparse.ArgumentParser) -> None:
    about = next(f.metadata["description"] for f in dataclasses.fields(RunConfig) if f.name == _ALLOW)
    parser.add_argument("--allow-missing", dest=_ALLOW, action="store_const", const="true", default=argparse.SUPPRESS, help=about)


def _add_fields(parser: argparse.ArgumentParser, cls: Any, section: str = "", names: Sequence[str] = ()) -> None:
    """Flags for the fields of a dataclass, or for some of them, in the order of `names`."""
    hints, fields = get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    for name in names or fields:
        each, key = fields[name], f"{section}.{name}".lstrip(".")
        default = each.default_factory() if each.default_factory is not dataclasses.MISSING else each.default
        about = f"{each.metadata['description']}{_of_methods(key)}"
        text = f"{about} [{type_name(hints[name])}; default: {default}]".replace("%", "%%")
        parser.add_argument(_flag(key), dest=key, metavar="VALUE", default=argparse.SUPPRESS, help=text)


def _of_methods(key: str) -> str:
    """What the methods say to a flag."""
    if key == "method":
        return ": " + "; ".join(f"{method.name}, {method.about}" for method in METHODS.values())
    if key == "train.preset":
        return "; of " + ", ".join(name for method in METHODS.values() for name in method.presets)
    return ""


def _flag(key: str) -> str:
    return "--data" if key == "data.source" else f"--{key.rpartition('.')[2].replace('_', '-')}"


def _run(options: argparse.Namespace) -> None:
    from mmdpo_trainers.run.pipeline import run_pipeline

    values = read_yaml(options.config)
    for assignment in options.set:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {assignment}: expected KEY=VALUE, such as --set score.layer=8")
        values = _assigned(values, key.split("."), _flag_value(f"--set {key}", text))
    if options.seed is not None:
        values["seed"] = _typed("seed", options.seed)
    if options.run_dir is not None:
        values["run_dir"] = options.run_dir
    if hasattr(options, _ALLOW):
        values[_ALLOW] = True
    values.setdefault("name", Path(options.config).stem)
    config = check_method(RunConfig.from_dict(values, where=options.config), options.config)
    run_pipeline(config, until=options.until, restart=options.restart)


def _stage(options: argparse.Namespace) -> None:
    from mmdpo_trainers.processes.progress import Progress
    from mmdpo_trainers.run.pipeline import held, restart_from, run_stage, set_threads
    from mmdpo_trainers.stages.context import StageContext
    from mmdpo_trainers.stages.folder import RunFolder

    run = RunFolder(options.run)
    config = _configuration(options, run.path / "config.yaml")
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
    print(yaml.safe_dump({context.name: shown}, sort_keys=False, allow_unicode=True), end="")


def _configuration(options: argparse.Namespace, saved: Path) -> RunConfig:
    """Settings of a command: its flags over --config, or over what was saved with the run."""
    file = Path(options.config) if options.config else saved
    values = read_yaml(file) if options.config or file.exists() else {"name": saved.parent.name}
    if "method" not in values:
        # A run that does not say its method yet is of the first that has the stage.
        values["method"] = next((name for name, method in METHODS.items() if options.stage in method.stages), RunConfig().method)
    for key, text in vars(options).items():
        if key.split(".")[0] in ("data", "online", *STAGES, *_SHARED, _ALLOW) and key != "config":
            values = _assigned(values, key.split("."), _typed(key, text))
    where = str(file) if file.exists() else "command line"
    return check_method(RunConfig.from_dict(values, where=where), where).with_absolute_paths()


def _reference(options: argparse.Namespace) -> None:
    from mmdpo_trainers.run.pipeline import held, set_threads
    from mmdpo_trainers.stages.context import StageContext
    from mmdpo_trainers.stages.folder import RunFolder

    if not options.run and not options.config:
        raise ConfigError("reference: give --run FOLDER, or --config CONFIG.yaml, whose run folder is then used")
    folder = Path(options.run) if options.run else _run_path(options.config)
    run = RunFolder(folder)
    config = _configuration(options, run.path / "config.yaml")
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


def _calibrate(options: argparse.Namespace) -> None:
    from mmdpo_trainers.run.calibrate import calibrate

    given = read_yaml(options.config) if options.config else {}
    model = getattr(options, "model", None) or given.get("model") or RunConfig().model
    folder = Path(options.run or Path("runs") / f"calibrate-{Path(model).name}")
    config = _configuration(options, folder / "config.yaml")
    prompts = config.augment.num_prompts or _PROMPTS
    # The middle layer of a run to come is no answer here.
    config = dataclasses.replace(
        config,
        run_dir=str(folder),
        score=dataclasses.replace(config.score, layer="best"),
        augment=dataclasses.replace(config.augment, num_prompts=prompts),
    )
    calibrate(config, restart=options.restart)


def _run_path(config: str) -> Path:
    """The run folder of a configuration file, as `mmdpo run` has it."""
    values = {"name": Path(config).stem, **read_yaml(config)}
    return RunConfig.from_dict(values, where=config).run_path


def _own_evaluation(options: argparse.Namespace, config: RunConfig) -> str | None:
    """Name of the evaluation that `mmdpo evaluate --input FILE` makes: one beside the run's, whose answers stay as they are."""
    given = options.stage == "evaluate" and getattr(options, "evaluate.input", None) is not None
    return Path(config.evaluate.input).stem if given and config.evaluate.input else None


def _check(options: argparse.Namespace) -> None:
    from mmdpo_trainers.checks.command import check_command

    check_command(
        options.model,
        adapter=options.adapter,
        device=options.device,
        dtype=options.dtype,
        quantization=_typed("quantization", options.quantization) if hasattr(options, "quantization") else None,
        only=options.only,
        as_json=options.json,
    )


def _env(options: argparse.Namespace) -> None:
    from mmdpo_trainers.cli.env import print_environment

    print_environment(Console())


def _typed(key: str, text: Any) -> Any:
    """A flag's text by its field's type: text stays text, everything else is read as YAML."""
    section, _, name = key.rpartition(".")
    owner = get_type_hints(RunConfig)[section] if section else RunConfig
    hint = get_type_hints(owner)[name]
    value = text if hint is str else _flag_value(_flag(key), text)
    if hint == str | None and value is not None:
        # A folder named 2024 is a text where the field takes one.
        value = text
    return getattr(validated(owner, {name: value}, where="command line", flag=_flag(key)), name)


def _flag_value(flag: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{flag} {text}: not a valid value ({getattr(error, 'problem', None) or error})") from error


def _assigned(values: dict[str, Any], parts: list[str], value: Any) -> dict[str, Any]:
    """`values` with the entry that `parts` lead to replaced; a part of digits is a number, as in augment.num_images.grid.4."""
    key: Any = int(parts[0]) if parts[0].isdigit() else parts[0]
    if len(parts) == 1:
        return {**values, key: value}
    inner = values.get(key)
    return {**values, key: _assigned(inner if isinstance(inner, dict) else {}, parts[1:], value)}


if __name__ == "__main__":
    sys.exit(main())
