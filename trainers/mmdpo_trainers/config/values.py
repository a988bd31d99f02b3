"""Checked values for configuration dataclasses: YAML in, typed dataclass out, with errors that name the key and the remedy."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from mmdpo_trainers.errors import ConfigError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers a value may be: from minimum to maximum, both included; above and below leave the limit itself out."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        limits = {"{} or more": self.minimum, "above {}": self.above, "at most {}": self.maximum, "below {}": self.below}
        return " and ".join(words.format(limit) for words, limit in limits.items() if limit is not None)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 5e-5 as a number (YAML 1.1 wants 5.0e-5) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            if isinstance(key, str | int | float):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """One YAML value, such as the text of a flag."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A YAML file whose top level is a mapping. Raises ConfigError naming the file and, where YAML knows it, the line."""
    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give a configuration file such as configs/shapes_mia_dpo.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines at the top level, got {type(values).__name__}")
    return values


def build(cls: type[T], values: Any, *, where: str, prefix: str = "") -> T:
    """A dataclass from a dict, every value checked against its field's type.

    Raises ConfigError naming `where`, the dotted key, and the nearest valid key or the expected type.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: {prefix.rstrip('.') or cls.__name__} must be a mapping, got {describe(values)}")
    hints = get_type_hints(cls)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            remedy = f"did you mean {prefix + near[0]!r}?" if near else f"valid keys: {', '.join(hints)}"
            raise ConfigError(f"{where}: unknown key {prefix + str(key)!r}; {remedy}")
    converted = {key: convert(value, hints[key], where=where, name=prefix + key) for key, value in values.items()}
    for each in dataclasses.fields(cls):  # type: ignore[arg-type]
        if each.name in converted:
            check_numbers(converted[each.name], each, where=where, name=prefix + each.name)
    return cls(**converted)


def check_numbers(value: Any, owner: dataclasses.Field[Any], *, where: str, name: str) -> None:
    """Raise ConfigError for a number outside of its field's `range`, or not finite, in a value or anywhere within it."""
    limits = owner.metadata.get("range", Range())
    if isinstance(value, dict):
        for key, item in value.items():
            check_numbers(item, owner, where=where, name=f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_numbers(item, owner, where=where, name=f"{name}[{index}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{where}: {name}: expected a finite number, got {value}")
        if value not in limits:
            raise ConfigError(f"{where}: {name}: expected {limits}, got {value}")


def convert(value: Any, hint: Any, *, where: str, name: str) -> Any:
    """`value` as the type `hint` (bool, int, float, str, None, Any, Literal, unions, list, tuple, dict, dataclasses)."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where=where, prefix=f"{name}.")  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, hint, where=where, name=name)
    if origin is Literal:
        # YAML reads a bare `none`-like word as text but `null`, `yes` and `no` as other things; only exact members are taken.
        if any(value is member or (type(value) is type(member) and value == member) for member in arguments):
            return value
        near = difflib.get_close_matches(str(value), [str(a) for a in arguments], n=1)
        hintline = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{where}: {name} must be one of {', '.join(map(str, arguments))}, got {describe(value)}{hintline}")
    if origin is list and isinstance(value, list | tuple):
        return [convert(item, arguments[0], where=where, name=f"{name}[{index}]") for index, item in enumerate(value)]
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(arguments):
        pairs = zip(value, arguments, strict=True)
        return tuple(convert(item, kind, where=where, name=f"{name}[{index}]") for index, (item, kind) in enumerate(pairs))
    if origin is dict and isinstance(value, dict):
        keys = [convert(key, arguments[0], where=where, name=f"key of {name}") for key in value]
        pairs = zip(keys, value.values(), strict=True)
        return {key: convert(item, arguments[1], where=where, name=f"{name}.{key}") for key, item in pairs}
    if origin is None and _is_plain(value, hint):
        return float(value) if hint is float else value
    raise ConfigError(f"{where}: {name} must be {type_name(hint)}, got {describe(value)}")


def _is_plain(value: Any, hint: Any) -> bool:
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(hint, type) and isinstance(value, hint)


def _convert_union(value: Any, members: tuple[Any, ...], hint: Any, *, where: str, name: str) -> Any:
    if value is None and type(None) in members:
        return None
    real = [member for member in members if member is not type(None)]
    for member in real:
        try:
            return convert(value, member, where=where, name=name)
        except ConfigError:
            if len(real) == 1:
                raise
    raise ConfigError(f"{where}: {name} must be {type_name(hint)}, got {describe(value)}")


def type_name(hint: Any) -> str:
    """A type in words, for error messages and --help."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return "any value"
    if hint is type(None):
        return "null"
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is dict:
        return f"a mapping of {type_name(arguments[0])} to {type_name(arguments[1])}"
    if origin is list:
        return f"a list of {type_name(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)} values ({', '.join(type_name(argument) for argument in arguments)})"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def describe(value: Any) -> str:
    """A value with its type, for error messages."""
    return f"{value!r} ({type(value).__name__})" if not isinstance(value, str) else f"the text {value!r}"
