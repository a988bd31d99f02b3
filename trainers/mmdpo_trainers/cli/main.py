"""The `mmdpo` command: a whole run from a YAML file, or one stage at a time.

This file needs nothing but the standard library: without what the extra `train` installs there are `mmdpo --help` and `mmdpo env`, and one
line that says what to install for everything else.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from mmdpo_trainers.cli import missing
from mmdpo_trainers.cli.words import Parser, unknown_words
from mmdpo_trainers.errors import MmdpoError
from mmdpo_trainers.processes import notices, ranks

_AT_ONCE = ("init", "check", "env", "export")
"""Commands that begin anew where they were interrupted."""
_DESCRIPTION = "Preference training for models that read several pictures."
_OF_TRAIN = (
    *(
        "init",
        "run",
        "augment",
        "generate",
        "rate",
        "score",
        "select",
        "rank",
        "pairs",
        "hallucinate",
        "train",
        "evaluate",
        "report",
    ),
    *("reference", "calibrate", "check", "export"),
)
"""Commands that need the extra `train`, in the order of the help: known also where their own files cannot be imported."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `mmdpo`. Returns the exit code: 0; 2 for an error of the user's, printed in one line; 130 if interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = f"mmdpo {words[0]}" if words and not words[0].startswith("-") else "mmdpo"
    try:
        options = _options(words, command)
        with notices.aside(), ranks.failing():
            options.action(options)
    except MmdpoError as error:
        _print_error(error)
        return 2
    except KeyboardInterrupt:
        if ranks.is_rank_0():
            ending = "" if words and words[0] in _AT_ONCE else "; the same command continues the run"
            print(f"mmdpo: interrupted{ending}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        _print_error(error, "; once that is put right, the same command continues")
        return 2
    except ImportError as error:
        line = missing.remedy(error, command)
        if line is None:
            raise
        _print_error(MmdpoError(line))
        return 2
    return 0


def _print_error(error: Exception, remedy: str = "") -> None:
    """In one line. Of a launch, the process that failed first says it, and the first process, whose output people read."""
    first = ranks.fail(error)
    if first.rank == ranks.rank() or ranks.is_rank_0():
        print(f"mmdpo: error: {' '.join(str(error).split())}{remedy}", file=sys.stderr)


def _options(words: Sequence[str], command: str) -> argparse.Namespace:
    """What was asked for. ImportError where that needs packages that are not there."""
    try:
        parser = make_parser()
    except ImportError as error:
        line = missing.remedy(error, "every other command")
        if line is None or command.removeprefix("mmdpo ") in _OF_TRAIN:
            raise
        parser = _bare_parser(line)
    if not words:
        parser.print_help()
        raise SystemExit(2)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(_unknown(unknown, options))
    return options


def _unknown(words: list[str], options: argparse.Namespace) -> str:
    """What to say of words that no flag takes."""
    bare = next((each for each in getattr(options, "set", []) if "=" not in each), None)
    if bare is not None:
        return f"--set {bare}: expected KEY=VALUE in one word, such as --set {bare}={words[0]}"
    try:
        return unknown_words(words, getattr(options, "stage", None))
    except ImportError:
        return f"{words[0]}: no such argument"


def make_parser() -> argparse.ArgumentParser:
    """The parser with all commands. ImportError where a package of the extra `train` is missing."""
    from mmdpo_trainers.cli import commands

    parser = Parser(
        prog="mmdpo",
        description=_DESCRIPTION,
        epilog="examples:\n  mmdpo run shapes_mia_dpo\n  mmdpo init --list\n  mmdpo env\n  mmdpo score --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add(added)
    _add_env(added)
    return parser


def _bare_parser(line: str) -> argparse.ArgumentParser:
    """With `env` alone; `line` says what the others need."""
    parser = Parser(
        prog="mmdpo",
        description=_DESCRIPTION,
        epilog=f"{line[0].upper()}{line[1:]}\n{textwrap.fill(', '.join(_OF_TRAIN), 79)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_env(parser.add_subparsers(metavar="COMMAND", required=True))
    return parser


def _add_env(commands: Any) -> None:
    about = "print versions, devices and kernel backends"
    env = commands.add_parser("env", help=about, description=f"{about[0].upper()}{about[1:]}.")
    env.set_defaults(action=_env)


def _env(options: argparse.Namespace) -> None:
    from mmdpo_trainers.cli.env import print_environment

    print_environment()


if __name__ == "__main__":
    sys.exit(main())
