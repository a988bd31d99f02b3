"""`mmdpo init`: a first configuration for a method and a model, or a copy of what is shipped."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

from mmdpo_trainers.cli.flags import parser_of
from mmdpo_trainers.config.shipped import CONFIGS, SHIPPED, shipped_configs
from mmdpo_trainers.config.stages import StageKind
from mmdpo_trainers.config.values import FILL_IN
from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.methods import METHODS, method_named

_KIND = StageKind(
    about="Write a first configuration, with comments, for a method and a model of yours.",
    examples=(
        "init mdpo --model llava-1.5-7b-hf --data pairs.jsonl                # writes mdpo.yaml; then: mmdpo run mdpo.yaml",
        "init mia_dpo --model Qwen/Qwen2.5-VL-7B-Instruct --data llava.json --image-folder images --output mine.yaml",
        "init llava_mia_dpo                    # a copy of a shipped configuration, to be changed",
        "init accelerate                       # the folder of launch files for accelerate; `init slurm`: the one for SLURM",
        "init --list",
    ),
)
_FOLDERS = ("accelerate", "slurm")


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = parser_of(commands, "init", _KIND, f"{_KIND.about} Nothing that exists is overwritten.")
    parser.add_argument("what", nargs="?", metavar="METHOD", help=f"{', '.join(METHODS)}; or the name of something shipped")
    parser.add_argument("--list", action="store_true", help="print methods and shipped configurations")
    parser.add_argument("--model", metavar="MODEL", help=f"a model folder, an id on the hub, or {', '.join(SHIPPED)}")
    parser.add_argument("--revision", metavar="NAME", help="of an id on the hub: branch, tag or commit")
    parser.add_argument(
        "--data", metavar="FILE", help="your data: single-image records, or preference pairs, as the method reads them"
    )
    parser.add_argument("--image-folder", metavar="FOLDER", help="folder that the records' picture paths are relative to")
    parser.add_argument("--output", metavar="FILE", help="the file to write (default: METHOD.yaml)")
    parser.set_defaults(action=_init)


def _init(options: argparse.Namespace) -> None:
    if options.list:
        print(_listing())
        return
    if options.what is None:
        raise ConfigError(f"init: give a method, {', '.join(METHODS)}, with --model; `mmdpo init --list` says what there is")
    if options.what in METHODS or options.what.endswith(".py"):
        _write(options)
    else:
        _copy(options)


def _listing() -> str:
    def described(path: Path) -> str:
        first = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        return textwrap.shorten(re.split(r"[.:](?:\s|$)", first)[0], 100, placeholder=" …")

    lines = ["methods, for `mmdpo init METHOD --model MODEL`:"]
    lines += [f"  {method.name:<24}{method.about}" for method in METHODS.values()]
    lines += ["", "configurations, for `mmdpo run NAME`, or `mmdpo init NAME` for a copy:"]
    lines += [f"  {name:<24}{described(path)}" for name, path in shipped_configs().items()]
    lines += ["", "launch files, for `mmdpo init NAME`:"]
    lines += [f"  {name:<24}{', '.join(path.name for path in sorted((CONFIGS / name).iterdir()))}" for name in _FOLDERS]
    return "\n".join(lines)


def _write(options: argparse.Namespace) -> None:
    """A configuration for a method."""
    if not options.model:
        raise ConfigError(f"init {options.what}: give --model: a folder, an id on the hub, or {', '.join(SHIPPED)}")
    method = method_named(options.what)
    target = Path(options.output or f"{method.name}.yaml")
    _refuse_existing(target)
    # Not earlier: a mistake on the command line is to be answered at once.
    from mmdpo_trainers.run.starting.facts import facts_of
    from mmdpo_trainers.run.starting.text import to_text
    from mmdpo_trainers.run.starting.values import Start, starting_values

    start = Start(
        method=method,
        model=options.model,
        name=target.stem,
        revision=options.revision,
        data=options.data,
        image_folder=options.image_folder,
    )
    facts = facts_of(options.model, options.revision)
    text = to_text(starting_values(start, facts), start, facts, str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    then = f"fill in what says {FILL_IN}, then: " if FILL_IN in text else ""
    print(f"wrote {target}; {then}mmdpo run {target}")


def _copy(options: argparse.Namespace) -> None:
    """A shipped configuration, or a folder of launch files."""
    shipped = {**shipped_configs(), **{name: CONFIGS / name for name in _FOLDERS}}
    if options.what not in shipped:
        known = [*METHODS, *shipped]
        near = difflib.get_close_matches(options.what, known, n=len(known), cutoff=0)
        raise ConfigError(f"init: there is no method or shipped file {options.what!r}; there are {', '.join(near)}")
    for flag in ("model", "revision", "data", "image_folder"):
        if getattr(options, flag):
            name = f"--{flag.replace('_', '-')}"
            raise ConfigError(
                f"{name}: {options.what} is copied as it is; give a method in place of it, or `mmdpo run` the value with --set"
            )
    source = shipped[options.what]
    target = Path(options.output or source.name)
    _refuse_existing(target)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
    print(f"wrote {target}")


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise ConfigError(f"{target} exists already, and is not overwritten; give another --output")
