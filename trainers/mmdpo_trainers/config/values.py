"""Settings checked by pydantic: YAML in, typed values out, with errors that name the file, the key and the remedy."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import AfterValidator, ConfigDict, Strict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from mmdpo_trainers.errors import ConfigError

T = TypeVar("T")
_UNIONS = (Union, UnionType)

FILL_IN = "FILL_IN"
"""Stands in a configuration for a value that only the user has."""


class UnknownKeyError(ConfigError):
    """A key that there is not. `key`: dotted, as it was given; `where`: what opens the message."""

    def __init__(self, message: str, key: str, where: str) -> None:
        super().__init__(message)
        self.key, self.where = key, where


class Settings:
    """Base of configuration dataclasses: what pydantic reads them with, see `validated`. Made in code they are not checked.

    Not strict, or no mapping would do for a dataclass and no list for a tuple. The plain types in them are, as StrictInt and so on:
    `yes` is not true, 3.0 not 3, and true not 1.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


_UNKNOWN = ("unexpected_keyword_argument", "invalid_key")
"""pydantic's names of a key that there is not."""
_LIMITS = {"ge": "{} or more", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
"""pydantic's names of limits -> words."""


def _finite(value: Any, place: str = "") -> Any:
    inner = [(f".{key}", item) for key, item in value.items()] if isinstance(value, dict) else []
    inner += [(f"[{index}]", item) for index, item in enumerate(value)] if isinstance(value, list | tuple) else []
    for key, item in inner:
        _finite(item, place + key)
    if isinstance(value, float) and not math.isfinite(value):
        raise PydanticCustomError("finite_number", "{place} is {number}", {"place": place, "number": value})
    return value


Finite = Annotated[T, AfterValidator(_finite)]
"""Arguments of something else, whose types are not known here: of any type, but no number in them is NaN or infinite."""


_YAML_HINTS = {
    "mapping values are not allowed": "is a space missing behind a colon in the line before, or are lines not equally far in?",
    "cannot start any token": "lines are indented with spaces, not tabs, and a text that begins with a special character is quoted",
}
"""What YAML says -> what it mostly comes from."""


def yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong with a text that is not YAML, and what it mostly comes from."""
    problem = str(getattr(error, "problem", None) or error)
    hint = next((hint for words, hint in _YAML_HINTS.items() if words in problem), None)
    return f"{problem}; {hint}" if hint else problem


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 5e-5 as a number (YAML 1.1 wants 5.0e-5) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, value_node in node.value:
            text = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else ""
            if node.flow_style and ":" in text and key_node.style is None and value_node.value == "":
                name, _, rest = text.partition(":")
                problem = f"a space is missing behind the colon of {text}: write {name}: {rest}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
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
        raise ConfigError(f"{path} does not exist; give a configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: not valid YAML: {yaml_problem(error)}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines at the top level, got {type(values).__name__}")
    return values


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of all that is no mapping."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def validated(hint: Any, value: Any, *, where: str, name: str = "", flag: str = "") -> Any:
    """`value` as a configuration dataclass, or as another type taken strictly.

    Raises ConfigError for what pydantic refuses first: `where`, the dotted key, and the nearest valid key or the expected type.
    `name` is what `value` is called there; `flag` is what the only key of a dataclass is called.
    """
    try:
        return _adapter(hint).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        message = f"{where}: {_explained(first, hint, name, flag)}"
        if first["type"] in _UNKNOWN:
            raise UnknownKeyError(message, ".".join(map(str, (*([name] if name else []), *first["loc"]))), where) from None
        raise ConfigError(message) from None


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    if dataclasses.is_dataclass(hint):
        return TypeAdapter(hint)
    # YAML writes a tuple as a list.
    taken: Any = Annotated[hint, Strict(False)] if get_origin(hint) is tuple else hint
    return TypeAdapter(taken, config=ConfigDict(strict=True))


def _explained(error: ErrorDetails, hint: Any, name: str, flag: str) -> str:
    kind, value, place, context = error["type"], error["input"], error["loc"], error.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    unknown = kind in _UNKNOWN
    # An unknown key, and an entry that a list lacks, are errors of what they are looked for in.
    hint, name, limits = _find(hint, place[:-1] if unknown or kind == "missing" else place, name, flag)
    if unknown:
        prefix, key, keys = f"{name}." if name else "", str(place[-1]), [each.name for each in dataclasses.fields(hint)]
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
        remedy = f"did you mean {prefix + near[0]!r}?" if near else f"valid keys: {', '.join(keys)}"
        return f"unknown key {prefix + key!r}; {remedy}"
    if kind == "finite_number":
        return f"{name}{context.get('place', '')}: expected a finite number, got {context.get('number', value)}"
    if kind.startswith(("greater_than", "less_than")):
        limits = {**context, **{limit: number for limit, number in limits.items() if number is not None}}
        words = [text.format(limits[limit]) for limit, text in _LIMITS.items() if limit in limits]
        return f"{name}: expected {' and '.join(words)}, got {float(value) if hint is float else value}"
    choices = map(str, get_args(hint)) if get_origin(hint) is Literal else ()
    near = difflib.get_close_matches(str(value), choices, n=1)
    remedy = f"; did you mean {near[0]!r}?" if near else ""
    return f"{name or hint.__name__} must be {type_name(hint)}, got {describe(value)}{remedy}"


def _find(
    hint: Any, place: Sequence[int | str], name: str, flag: str, limits: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Any, str, Mapping[str, Any]]:
    """Type, dotted key and limits of what lies at pydantic's `place` in a `hint`; of a union's members, the union."""
    real = [each for each in get_args(hint) if each is not type(None)] if get_origin(hint) in _UNIONS else [hint]
    if len(real) > 1:
        return hint, name, limits
    hint, origin, arguments = real[0], get_origin(real[0]), get_args(real[0])
    if not place:
        return hint, name, limits
    part, *rest = place
    if dataclasses.is_dataclass(hint):
        limits = next(each.metadata for each in dataclasses.fields(hint) if each.name == part)
        return _find(get_type_hints(hint)[str(part)], rest, f"{name}.{part}" if name else flag or str(part), flag, limits)
    if origin is dict and rest == ["[key]"]:
        return arguments[0], f"key of {name}", limits
    if origin is dict:
        return _find(arguments[1], rest, f"{name}.{part}", flag, limits)
    return _find(arguments[int(part) if origin is tuple else 0], rest, f"{name}[{part}]", flag, limits)


def type_name(hint: Any) -> str:
    """A type in words, for error messages and --help."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return "any value"
    if hint is type(None):
        return "null"
    if dataclasses.is_dataclass(hint):
        return "a mapping"
    if origin in _UNIONS:
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
