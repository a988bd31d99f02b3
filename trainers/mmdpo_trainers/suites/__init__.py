"""Published benchmarks, one declaration each: how its files are read, how it is asked, and what an answer is worth.

Imported by stages; imports data and what is below it. Declarations are found, not listed: a file of `declared/` that holds `SUITES` has some.
How marks become figures with intervals, `report/benchmarks.py` says.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil

from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.suites import declared
from mmdpo_trainers.suites.suite import Suite

__all__ = ["Suite", "suite_named", "suites"]


@functools.cache
def suites() -> dict[str, Suite]:
    """Name -> benchmark."""
    modules = (importlib.import_module(f"{declared.__name__}.{each.name}") for each in pkgutil.iter_modules(declared.__path__))
    found = [suite for module in modules for suite in module.SUITES]
    return {suite.name: suite for suite in sorted(found, key=lambda suite: suite.name)}


def suite_named(key: str, setting: str = "evaluate.benchmarks") -> Suite:
    """The benchmark that a key of `evaluate.benchmarks` means: its name, or its name and a word behind a hyphen (`mmbench-cn`).

    Raises ConfigError naming the nearest one.
    """
    name = key.partition("-")[0]
    if name in suites():
        return suites()[name]
    near = difflib.get_close_matches(name, suites(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"{setting}: there is no benchmark {key!r}{hint}; expected one of {', '.join(suites())}, or one of these with a word of your own "
        "behind a hyphen, such as mmbench-cn"
    )
