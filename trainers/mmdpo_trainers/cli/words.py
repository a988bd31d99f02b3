"""The argument parser of `mmdpo`, whose errors are one line with a remedy, and what it says of words that it does not know."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from typing import NoReturn

_CHOICE = re.compile(r"invalid choice: '?(.*?)'? \(choose from (.*)\)$")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that does not print the usage, which is a screenful for some commands, over its error."""

    def error(self, message: str) -> NoReturn:
        """Print one line and end the process with exit code 2."""
        found = _CHOICE.search(message)
        if found:
            near = difflib.get_close_matches(found[1], [word.strip(" '") for word in found[2].split(",")], n=1)
            message += f"; did you mean {near[0]}?" if near else ""
        print(f"mmdpo: error: {message}; see `{self.prog} --help`", file=sys.stderr)
        raise SystemExit(2)


def unknown_words(words: list[str], stage: str | None) -> str:
    """What to say of words that no flag takes. stage: of a stage's command, its stage; None: `mmdpo run` or another one."""
    from mmdpo_trainers.cli.nearest import settings_named

    first = words[0]
    key, equals, value = first.partition("=")
    if not equals and first.startswith("--") and len(words) > 1:
        value = words[1]
    found = settings_named(f"{stage}.{key}" if stage else key) if equals or first.startswith("--") else []
    if not found:
        return f"{first}: no such argument"
    shown = value or "VALUE"
    if stage is None:
        return f"{first}: a setting is given as --set {found[0]}={shown}{_others(found[1:])}"
    section, _, name = found[0].partition(".")
    flag = (
        f"--args '{{{name.partition('.')[2]}: {shown}}}'" if name.startswith("args.") else f"--{name.replace('_', '-')} {shown}"
    )
    if section != stage:
        return f"{first}: no setting of {stage}; {found[0]} is one of `mmdpo {section}`"
    return f"{first}: that setting is given as {flag}"


def _others(found: list[str]) -> str:
    return f"; there are also {', '.join(found)}" if found else ""
