"""Flags from the configuration dataclasses, and settings from what was given for them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from mmdpo_trainers.cli.nearest import settings_named
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.shipped import SHIPPED, config_file
from mmdpo_trainers.config.stages import STAGES, StageKind
from mmdpo_trainers.config.values import UnknownKeyError, parse_yaml, read_yaml, type_name, validated, yaml_problem
from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.methods import METHODS, check_method

SHARED = ("method", "model", "revision", "seed", "threads", "dtype", "quantization", "device")
ALLOW = "allow_missing"


def parser_of(commands: Any, name: str, kind: StageKind, description: str) -> argparse.ArgumentParser:
    """The parser of a command, with its examples."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=kind.about[0].lower() + kind.about[1:].rstrip("."),
        description=description,
        epilog="examples:\n" + "\n".join(f"  mmdpo {example}" for example in kind.examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_section(parser: argparse.ArgumentParser, stage: str) -> None:
    """A flag for each field of a stage's section, and for those that all stages have."""
    add_fields(parser, get_type_hints(RunConfig)[stage], stage)
    add_fields(parser, RunConfig, names=SHARED)
    add_allow_missing(parser)


def add_allow_missing(parser: argparse.ArgumentParser) -> None:
    """The flag of what may be left out."""
    about = next(f.metadata["description"] for f in dataclasses.fields(RunConfig) if f.name == ALLOW)
    parser.add_argument("--allow-missing", dest=ALLOW, action="store_const", const="true", default=argparse.SUPPRESS, help=about)


def add_fields(parser: argparse.ArgumentParser, cls: Any, section: str = "", names: Sequence[str] = ()) -> None:
    """Flags for the fields of a dataclass, or for some of them, in the order of `names`."""
    hints, fields = get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    for name in names or fields:
        each, key = fields[name], f"{section}.{name}".lstrip(".")
        default = each.default_factory() if each.default_factory is not dataclasses.MISSING else each.default
        about = f"{each.metadata['description']}{_of_methods(key)}"
        text = f"{about} [{type_name(hints[name])}; default: {default}]".replace("%", "%%")
        parser.add_argument(flag_of(key), dest=key, metavar="VALUE", default=argparse.SUPPRESS, help=text)


def _of_methods(key: str) -> str:
    """What the methods say to a flag."""
    if key == "method":
        return ": " + "; ".join(f"{method.name}, {method.about}" for method in METHODS.values())
    if key == "train.preset":
        return "; of " + ", ".join(name for method in METHODS.values() for name in method.presets)
    return ""


def flag_of(key: str) -> str:
    """The flag of a setting."""
    return "--data" if key == "data.source" else f"--{key.rpartition('.')[2].replace('_', '-')}"


def configuration(options: argparse.Namespace, saved: Path) -> RunConfig:
    """Settings of a command: its flags over --config, or over what was saved with the run."""
    file = config_file(options.config) if options.config else saved
    values = read_yaml(file) if options.config or file.exists() else {"name": saved.parent.name}
    if "method" not in values:
        # A run that does not say its method yet is of the first that has the stage.
        values["method"] = next((name for name, method in METHODS.items() if options.stage in method.stages), RunConfig().method)
    for key, text in vars(options).items():
        if key.split(".")[0] in ("data", "online", *STAGES, *SHARED, ALLOW) and key != "config":
            values = assigned(values, key.split("."), typed(key, text))
    where = str(file) if file.exists() else "command line"
    return check_method(checked(values, where), where).with_absolute_paths()


def checked(values: dict[str, Any], where: str) -> RunConfig:
    """As `RunConfig.from_dict`; the error of a key that there is not names the settings that may have been meant."""
    try:
        return RunConfig.from_dict(values, where=where)
    except UnknownKeyError as error:
        found = settings_named(error.key)
        if not found or any(repr(each) in str(error) for each in found):
            raise
        raise ConfigError(f"{error.where}: unknown key {error.key!r}; did you mean {' or '.join(map(repr, found))}?") from None


def check_places(config: RunConfig, file: Path) -> None:
    """Raise ConfigError for a relative path that leads nowhere from here, and somewhere from the configuration's own folder."""
    for section, hint in get_type_hints(RunConfig).items():
        for each in dataclasses.fields(hint) if dataclasses.is_dataclass(hint) else ():
            given = getattr(getattr(config, section), each.name)
            for path in [given] if isinstance(given, str) and each.metadata["path"] else []:
                beside = file.absolute().parent / path
                if not Path(path).exists() and path not in SHIPPED and not Path(path).is_absolute() and beside.exists():
                    raise ConfigError(
                        f"{file}: {section}.{each.name}: {path} does not exist in {Path.cwd()}, from where relative paths count; write "
                        f"{beside}, or start mmdpo in {beside.parent if '/' not in path else file.absolute().parent}"
                    )


def run_path(config: str) -> Path:
    """The run folder of a configuration, as `mmdpo run` has it."""
    values = {"name": Path(config).stem, **read_yaml(config_file(config))}
    return checked(values, config).run_path


def typed(key: str, text: Any) -> Any:
    """A flag's text by its field's type: text stays text, everything else is read as YAML."""
    section, _, name = key.rpartition(".")
    owner = get_type_hints(RunConfig)[section] if section else RunConfig
    hint = get_type_hints(owner)[name]
    value = text if hint is str else yaml_value(flag_of(key), text)
    if hint == str | None and value is not None:
        # A folder named 2024 is a text where the field takes one.
        value = text
    return getattr(validated(owner, {name: value}, where="command line", flag=flag_of(key)), name)


def yaml_value(flag: str, text: str) -> Any:
    """The text of a flag as YAML. Raises ConfigError where it is none."""
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{flag} {text}: not a valid value ({yaml_problem(error)})") from error


def assigned(values: dict[str, Any], parts: list[str], value: Any) -> dict[str, Any]:
    """`values` with the entry that `parts` lead to replaced; a part of digits is a number, as in augment.num_images.grid.4."""
    key: Any = int(parts[0]) if parts[0].isdigit() else parts[0]
    if len(parts) == 1:
        return {**values, key: value}
    inner = values.get(key)
    return {**values, key: assigned(inner if isinstance(inner, dict) else {}, parts[1:], value)}
