"""What a patched model tells its recorder: called as it is, or as operators where `torch.compile` traces it.

Traced code runs later and again, without the Python around it: what reaches the recorder from there goes through operators, which find it by a
ticket, a tensor. So a graph serves every recorder, and every layer that shares it. Operators change the ticket, which keeps them in the graph
and in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from .op_names import add_op_namespace_prefix
from .ops.flat import schema_of
from .patched import AttentionPlace, language_tower, state_of
from .recorder import AttentionRecorder, LayerCall

_HOOK: Any = "mmdpo_record"
"""The key of hooks, the same for every recording: compiled code is guarded by it."""

_RECORDERS: WeakValueDictionary[int, AttentionRecorder] = WeakValueDictionary()
_numbers = itertools.count()


def ticket_of(recorder: AttentionRecorder) -> Tensor:
    """(2,) int64 on the CPU: the recorder's number, and how often operators were called."""
    number = next(_numbers)
    _RECORDERS[number] = recorder
    with torch.inference_mode(False):
        return torch.tensor([number, 0], device="cpu")


def watch_attention(
    place: AttentionPlace,
    recorder: AttentionRecorder,
    query: Tensor,
    key: Tensor,
    call: LayerCall,
) -> None:
    """One attention call of a recorded model."""
    if torch.compiler.is_compiling():
        _observe(recorder.ticket, place.layer, query.detach(), key.detach(), *call)
    else:
        recorder.observe(int(place.layer), query, key, call)


@torch.library.custom_op(
    add_op_namespace_prefix("record_attention_call"),
    mutates_args={"ticket"},
    schema=f"(Tensor(a0!) ticket, Tensor layer, Tensor query, Tensor key, {schema_of(LayerCall)}) -> ()",
)
def _observe(ticket: Tensor, layer: Tensor, query: Tensor, key: Tensor, *fields: Any) -> None:
    ticket[1] += 1
    recorder = _RECORDERS.get(int(ticket[0]))
    if recorder is not None:
        recorder.observe(int(layer), query, key, LayerCall(*fields))


@torch.library.custom_op(add_op_namespace_prefix("record_forward"), mutates_args={"ticket"})
def _reads(ticket: Tensor, past: int, past_on_device: Tensor | None, length: int) -> None:
    ticket[1] += 1
    recorder = _RECORDERS.get(int(ticket[0]))
    if recorder is not None:
        recorder.before_decoder(past if past_on_device is None else int(past_on_device), length)


@torch.library.custom_op(add_op_namespace_prefix("record_input_ids"), mutates_args={"ticket"})
def _reads_ids(ticket: Tensor, input_ids: Tensor | None) -> None:
    ticket[1] += 1
    recorder = _RECORDERS.get(int(ticket[0]))
    if recorder is not None:
        recorder.before_model(None if input_ids is None else input_ids.clone())


def _before_decoder(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    state = state_of(module)
    recorder = None if state is None else state.recorder
    if recorder is None:  # a copy that was made while its original was recorded
        return
    given = (*args, *kwargs.values())
    # By what it can do: transformers has called it by several names.
    cache = next((value for value in given if hasattr(value, "get_seq_length")), None)
    length = _tokens_of(args, kwargs)
    past = 0 if cache is None else cache.get_seq_length()
    if torch.compiler.is_compiling():
        on_device = isinstance(past, Tensor)  # of a static cache
        _reads(recorder.ticket, 0 if on_device else past, past if on_device else None, length)
    else:
        recorder.before_decoder(int(past), length)


def _tokens_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many tokens a decoder is called with: its embeddings by name, its ids, or the first embeddings among what has no name."""
    inputs = kwargs.get("inputs_embeds")
    if inputs is None:
        inputs = kwargs.get("input_ids")
    if inputs is None and args:
        inputs = args[0]
    if inputs is None:
        inputs = next(value for value in args if isinstance(value, Tensor) and value.ndim == 3)
    length: int = inputs.shape[1]
    return length


def _before_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    state = state_of(language_tower(module))
    recorder = None if state is None else state.recorder
    if recorder is None:
        return
    input_ids = kwargs.get("input_ids", args[0] if args else None)
    if torch.compiler.is_compiling():
        _reads_ids(recorder.ticket, input_ids)
    else:
        recorder.before_model(input_ids)


def watch_decoder(tower: nn.Module, undo: ExitStack) -> None:
    """Tell the recorder of every forward of the decoder."""
    _add_hook(tower, _before_decoder, undo)


def watch_model(model: nn.Module, undo: ExitStack) -> None:
    """Tell the recorder the ids that the model is called with."""
    _add_hook(model, _before_model, undo)


def _add_hook(module: nn.Module, hook: Callable[..., None], undo: ExitStack) -> None:
    # `register_forward_pre_hook` takes a new key each time, which compiled code would be made again for.
    module._forward_pre_hooks[_HOOK] = hook
    module._forward_pre_hooks_with_kwargs[_HOOK] = True
    undo.callback(_remove_hook, module)


def _remove_hook(module: nn.Module) -> None:
    module._forward_pre_hooks.pop(_HOOK, None)
    module._forward_pre_hooks_with_kwargs.pop(_HOOK, None)


class Replaced:
    """A method of one module while it is recorded; made a copy with the module, it belongs to the copy.

    function: called as function(replaced, args, kwargs), and never traced by `torch.compile`, which traces what it calls.
    """

    module: nn.Module
    name: str
    function: Callable[..., Any]
    own: Callable[..., Any] | None

    def __init__(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        self.__setstate__({"module": module, "name": name, "function": function, "own": module.__dict__.get(name)})

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "untraced"}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
        self.untraced = torch.compiler.disable(self.function, recursive=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.untraced(self, args, kwargs)

    def original(self) -> Callable[..., Any]:
        """What the module has without it."""
        return getattr(type(self.module), self.name).__get__(self.module) if self.own is None else self.own  # type: ignore[no-any-return]

    def put_back(self) -> None:
        """Give the module back what it had."""
        if self.own is None:
            self.module.__dict__.pop(self.name, None)
        else:
            self.module.__dict__[self.name] = self.own


def replace_method(module: nn.Module, name: str, function: Callable[..., Any], undo: ExitStack) -> None:
    """Give the module a method of its own until `undo`, see `Replaced`."""
    replaced = module.__dict__[name] = Replaced(module, name, function)
    undo.callback(replaced.put_back)


def remove_watch(model: nn.Module) -> None:
    """Take away what the model has of its original's recording, if it was copied during one."""
    for module in model.modules():
        _remove_hook(module)
        for value in list(module.__dict__.values()):
            if isinstance(value, Replaced):
                value.put_back()
