"""Which settings somebody may have meant by a name: `beta` is `train.args.beta`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any, get_type_hints

from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.methods import METHODS


def settings_named(key: str) -> list[str]:
    """Dotted settings whose last part is that of `key`, or else the nearest to it; none where nothing is near."""
    name = key.rpartition(".")[2].lstrip("-").replace("-", "_")
    every = [*_fields(RunConfig), *(f"train.args.{each}" for each in _of_presets())]
    found = [each for each in every if each.rpartition(".")[2] == name]
    if found:
        return _first(found, key)
    every += [f"train.args.{each}" for each in _of_trainers()]
    leaves: dict[str, list[str]] = {}
    for each in dict.fromkeys(every):
        leaves.setdefault(each.rpartition(".")[2], []).append(each)
    near = difflib.get_close_matches(name, leaves, n=3, cutoff=0.75)
    return _first([each for leaf in near for each in leaves[leaf]], key)


def _first(found: list[str], key: str) -> list[str]:
    """Those of the section that was named come first."""
    section = key.partition(".")[0]
    return sorted(dict.fromkeys(found), key=lambda each: not each.startswith(f"{section}."))[:4]


def _fields(cls: Any, prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(cls).items():
        yield f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            yield from _fields(hint, f"{prefix}{name}.")


def _of_presets() -> list[str]:
    return list(dict.fromkeys(name for method in METHODS.values() for values in method.presets.values() for name in values))


def _of_trainers() -> list[str]:
    # Not earlier: it loads torch.
    from mmdpo_trainers.training.trainers import TRAINERS

    return list(dict.fromkeys(each.name for trainer in TRAINERS.values() for each in dataclasses.fields(trainer.config_class)))
