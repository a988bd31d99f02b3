"""The values that a first configuration has: a method's published ones, what the model's family needs, and the user's paths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdpo_trainers.answers.hidden_images import check_hiding
from mmdpo_trainers.config.shipped import SHIPPED, shipped_configs
from mmdpo_trainers.config.values import FILL_IN, read_yaml
from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.methods import METHODS, ONLINE, Method
from mmdpo_trainers.models.families import family_of
from mmdpo_trainers.run.starting.facts import ModelFacts

_OF_THE_MACHINE = ("per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "gradient_checkpointing")
_HALF = ("bfloat16", "float16")
_SECTIONS = {"augment": ("data", "augment")}
"""Stage -> sections of the configuration that it begins with, where that is not the one of its name."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What the user said."""

    method: Method
    model: str
    name: str
    revision: str | None = None
    data: str | None = None
    image_folder: str | None = None


def starting_values(start: Start, facts: ModelFacts) -> dict[str, Any]:
    """A configuration as nested values, in the order in which it is read.

    Raises ConfigError for what the method cannot do with the model or the data.
    """
    method, example = start.method, _example(start.method)
    half = facts.dtype in _HALF
    values: dict[str, Any] = {
        "name": start.name,
        "method": str(method.file.absolute()) if method.file else method.name,
        "model": str(Path(start.model).expanduser().absolute()) if _is_folder(start.model) else start.model,
        **({"revision": start.revision} if start.revision else {}),
        # Steps in float16 would need their losses scaled.
        "dtype": "bfloat16" if half else "auto",
        **({"chat_template_kwargs": {"enable_thinking": False}} if facts.thinks else {}),
        "seed": 0,
    }
    optional = set(method.optional)
    for stage in method.stages:
        for section in _SECTIONS.get(stage, (stage,)) if stage not in optional else ():
            if section in example and section != "train":
                values[section] = dict(example[section])
        if stage == "train":
            values |= {name: dict(example[name]) for name in (ONLINE,) if name in example and _is_own(example, method)}
            values |= {"rate": dict(example["rate"])} if ONLINE in values and "rate" in example else {}
            values["train"] = _train(method, example, half)
    values.get("report", {}).pop("title", None)
    _set_data(values, start)
    _set_model(values, facts, method)
    return {name: value for name, value in values.items() if value != {}}


def _example(method: Method) -> dict[str, Any]:
    """The shipped configuration whose values are begun with: the method's own, or another's that begins with the same stage."""
    alike = (each.example for each in METHODS.values() if each.stages[0] == method.stages[0])
    name = method.example or next(filter(None, alike), None)
    return read_yaml(shipped_configs()[name]) if name else {}


def _is_own(example: dict[str, Any], method: Method) -> bool:
    return bool(example.get("method", next(iter(METHODS))) == method.name)


def _train(method: Method, example: dict[str, Any], half: bool) -> dict[str, Any]:
    """The section `train`: the method's paper spelled out, so that it can be changed value by value."""
    given = example.get("train", {})
    own = given if _is_own(example, method) else {}
    preset = own.get("preset") or method.default_preset
    paper = {name: value for name, value in method.presets[preset].items() if name != ONLINE and value is not None}
    machine = {name: given.get("args", {})[name] for name in _OF_THE_MACHINE if name in given.get("args", {})}
    args = {**own.get("args", {}), **paper, **machine}
    args |= {"bf16": True} if half else {}
    if not half:
        args.pop("bf16", None)
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in args.items()}
    return {"preset": preset, **{name: value for name, value in own.items() if name not in ("preset", "args")}, "args": plain}


def _set_data(values: dict[str, Any], start: Start) -> None:
    section = "data" if "data" in values else "pairs"
    if section == "pairs" and start.image_folder:
        raise ConfigError(
            f"--image-folder: {start.method.name} reads preference pairs, whose picture paths are relative to their file's folder; leave it out"
        )
    for flag, path in (("--data", start.data), ("--image-folder", start.image_folder)):
        if path and path not in SHIPPED and not Path(path).expanduser().exists():
            raise ConfigError(f"{flag}: {path} does not exist; mend the path, or leave {flag} out and fill it in later")
    values[section]["source"] = _placed(start.data) if start.data else FILL_IN
    if section == "data":
        values["data"]["image_folder"] = _placed(start.image_folder) if start.image_folder else None
        # The paper's number is of 665,000 records.
        values["augment"]["num_prompts"] = None
    if values.get("rate", {}).get("source") == "endpoint":
        values["rate"]["endpoint"] = {**values["rate"]["endpoint"], "url": FILL_IN, "model": FILL_IN}


def _set_model(values: dict[str, Any], facts: ModelFacts, method: Method) -> None:
    if "hallucinate" in method.stages:
        check_hiding(family_of(facts.config), facts.config)
    if "score" in values:
        values["score"] |= {"layer": facts.middle, "statistic": "mass" if facts.same_size else "mean"}
    if "augment" in values:
        values["augment"] |= {"square": facts.same_size or facts.crops}


def _is_folder(model: str) -> bool:
    return model not in SHIPPED and Path(model).expanduser().is_dir()


def _placed(path: str) -> str:
    """Absolute, so that the file means the same from any folder; names of what is shipped stay."""
    return path if path in SHIPPED else str(Path(path).expanduser().absolute())
