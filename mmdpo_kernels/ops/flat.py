"""The tuples of calls where PyTorch wants flat arguments: in the schemas of operators, and among the tensors saved for a backward."""

from __future__ import annotations

from typing import Any, TypeVar, get_type_hints

from torch import Tensor

CallT = TypeVar("CallT", bound=tuple[Any, ...])

# As `torch.library.infer_schema` writes them.
_KINDS: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "SymInt",
    int | None: "SymInt?",
    float: "float",
    float | None: "float?",
    str: "str",
    str | None: "str?",
    tuple[str, ...]: "str[]",
    tuple[float, ...] | None: "float[]?",
}


def schema_of(call: type[tuple[Any, ...]]) -> str:
    """The fields of a NamedTuple as arguments of an operator."""
    return ", ".join(f"{_KINDS[kind]} {name}" for name, kind in get_type_hints(call).items())


def tensors_and_rest(call: CallT) -> tuple[list[Tensor | None], CallT]:
    """One entry a field, None where it is no tensor; and the call without its tensors."""
    tensors = [value if isinstance(value, Tensor) else None for value in call]
    return tensors, _made(call, [None if isinstance(value, Tensor) else value for value in call])


def with_tensors(rest: CallT, tensors: list[Tensor | None]) -> CallT:
    """The inverse."""
    return _made(rest, [value if tensor is None else tensor for value, tensor in zip(rest, tensors, strict=True)])


def _made(like: CallT, values: list[Any]) -> CallT:
    made: CallT = type(like)._make(values)  # type: ignore[attr-defined]
    return made
