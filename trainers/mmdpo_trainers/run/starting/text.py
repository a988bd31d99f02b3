"""A configuration as YAML that teaches: over each setting what it does, its default and when to change it, as its declaration says."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, get_type_hints

import yaml

from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.values import FILL_IN, flat
from mmdpo_trainers.methods import Method
from mmdpo_trainers.run.starting.facts import ModelFacts
from mmdpo_trainers.run.starting.values import Start
from mmdpo_trainers.training.trainers import TRAINERS

_WIDTH = 110
_ARGS = "args"
# transformers calls the setting by another name from 5.20 on, and describes that one alone.
_ABOUT_ARGS = {"gradient_checkpointing": "compute activations again in the backward pass in place of keeping them; null is false"}
_WHEN_ARGS = {
    "beta": "higher keeps the model nearer to what it was",
    "bf16": "on a GPU without bfloat16, false",
    "full_finetune": "false trains a LoRA adapter, in a fraction of the memory; learning_rate is then to be about ten times as high",
    "gradient_accumulation_steps": "divide it by the number of GPUs, and multiply it by what per_device_train_batch_size is divided by",
    "gradient_checkpointing": "false where memory is left: steps are faster then",
    "learning_rate": "lower, where held-out accuracy falls while that of the training rises",
    "lora_r": "lower for less memory; keep lora_alpha twice as high",
    "num_train_epochs": "more for few pairs; fewer where held-out accuracy falls again",
    "per_device_train_batch_size": "higher, as memory allows, and gradient_accumulation_steps lower by as much",
}
_FILL = {
    "data.source": "your single-image data with answers, such as LLaVA's .json",
    "pairs.source": "your preference pairs: .jsonl or .parquet with prompt, chosen, rejected, images",
    "rate.endpoint.url": "where the judge is; or another rate.source, such as exact, the data's own answers",
    "rate.endpoint.model": "the judge's name there",
}


def to_text(values: Mapping[str, Any], start: Start, facts: ModelFacts, file: str) -> str:
    """The text of a configuration file. file: what it is called, for the command in its first lines."""
    method = start.method
    missing = [name for name, value in flat(values) if value == FILL_IN]
    head = [f"{method.title}: {method.about}. Start, or continue, it with: mmdpo run {file}"]
    head += [f"To be filled in before: {', '.join(missing)}."] if missing else []
    head += [
        "Over each setting: what it does, its default, when to change it. All other settings: mmdpo STAGE --help, with STAGE of "
        f"{', '.join(method.stages)}. None is written null. Relative paths count from the folder in which mmdpo is started."
    ]
    lines = [line for text in head for line in _comment(text, "")]
    lines += [
        "",
        *_section(RunConfig, {name: value for name, value in values.items() if not isinstance(value, dict)}, "", facts, method),
    ]
    for name, section in values.items():
        if not isinstance(section, dict):
            continue
        hint = get_type_hints(RunConfig)[name]
        if not dataclasses.is_dataclass(hint):
            lines += _section(RunConfig, {name: section}, "", facts, method)
            continue
        lines += ["", *_comment(next(_about(RunConfig, name)), ""), f"{name}:"]
        lines += _section(hint, section, f"{name}.", facts, method)
    return "\n".join(lines) + "\n"


def _section(cls: Any, values: Mapping[str, Any], prefix: str, facts: ModelFacts, method: Method) -> Iterator[str]:
    indent, hints = "  " * prefix.count("."), get_type_hints(cls)
    for name, value in values.items():
        key = f"{prefix}{name}"
        for text in (*_about(cls, name, method), *_facts(key, facts)):
            yield from _comment(text, indent)
        if value == FILL_IN:
            yield from _comment(f"FILL IN: {_FILL[key]}", indent)
        if dataclasses.is_dataclass(hints[name]):
            yield f"{indent}{name}:"
            yield from _section(hints[name], value, f"{key}.", facts, method)
        elif key == f"train.{_ARGS}":
            yield f"{indent}{name}:"
            yield from _section(TRAINERS[method.trainer].config_class, value, f"{key}.", facts, method)
        else:
            yield f"{indent}{name}: {_dumped(value)}"


def _about(cls: Any, name: str, method: Method | None = None) -> Iterator[str]:
    """What a setting's declaration says of it."""
    field = next(each for each in dataclasses.fields(cls) if each.name == name)
    default = field.default_factory() if callable(field.default_factory) else field.default
    about = field.metadata.get("description") or _ABOUT_ARGS.get(name) or str(field.metadata.get("help", ""))
    plain = not dataclasses.is_dataclass(default) and default is not dataclasses.MISSING and name != _ARGS
    yield f"{about.rstrip('.')} [default: {_dumped(default)}]" if plain and method else about
    when = field.metadata.get("when") or (_WHEN_ARGS.get(name) if "description" not in field.metadata else "")
    if when:
        yield f"When to change it: {when}"


def _facts(key: str, facts: ModelFacts) -> Iterator[str]:
    """What is to be known of this model beside a setting."""
    if key == "model":
        known = "" if facts.declared else ", which has no declaration here and is used by transformers' conventions"
        yield f"Family {facts.family}{known}; {len(facts.layers)} decoder layers see pictures."
        if facts.warning:
            yield facts.warning
        how = "Its chat template makes of a question" if facts.has_template else "It has no chat template; a question becomes"
        yield f"{how}: {facts.prompt!r}"
        if facts.no_trees:
            yield f"Prompts of a pair run once for each response, not once for both: {facts.no_trees}."
    if key == "dtype" and facts.dtype:
        yield f"The checkpoint is in {facts.dtype}."
    if key == "chat_template_kwargs":
        yield "This chat template can begin an answer with a part of thinking; answers of most data have none."
    if key == "score.layer":
        yield f"This model: {facts.layers[0]} to {facts.layers[-1]}; {facts.middle} is the middle one."
    if key == "score.statistic" and not facts.same_size:
        yield "This model: pictures have different numbers of tokens, and in a sum the larger would count for more."
    if key == "train.preset":
        yield "Its values are spelled out in args, to be changed one by one."
    if key == "train.args.lora_r":
        yield f"This model: adapted is {facts.adapted} (lora_target)."
    if key == "train.args.loss_type" and facts.has_experts:
        yield "This model has experts: their load-balancing loss is added, see router_aux_loss_coef in docs/training.md."


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}#   ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _dumped(value: Any) -> str:
    """A value as it stands behind its key."""
    plain = list(value) if isinstance(value, tuple) else value
    return (
        yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
        .removesuffix("...\n")
        .strip()
    )
