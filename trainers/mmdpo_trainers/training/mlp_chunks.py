"""Under gradient checkpointing, a layer's MLP runs in chunks of rows, so that what its backward needs is there for one chunk at a time.

Run again in the backward pass, a layer has gate, up, activation and product of all its rows at once, each the MLP's width: the peak of a
training step with long trees. An MLP computes row by row, so its rows can be taken in turn ("TiledMLP" of Arctic Long Sequence Training,
https://arxiv.org/abs/2506.13996). Here each chunk is a non-re-entrant `torch.utils.checkpoint` inside the layer's. All chunks take their
input from one tensor that is saved before the first of them runs: a layer whose MLP comes last is run again up to there and no further, so
an MLP runs forward twice and backward once, as without chunks. Parameters get one gradient, from one graph, which is what DDP, ZeRO-2 and
FSDP2 count; with ZeRO-3 MLPs stay whole.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from mmdpo_trainers.training.config import PreferenceConfig
from mmdpo_trainers.training.model_parts import base_of

CHUNK_ROWS = 512
"""Rows of a chunk where `mlp_chunk_rows` leaves it open: enough for products of full speed, on CPUs and GPUs."""

_NAMES = ("mlp", "feed_forward")
_NORM_AFTER = re.compile("post_(feedforward|mlp|ffn)")


def chunk_mlps(model: nn.Module, args: PreferenceConfig) -> int:
    """Let the MLPs of the language model's layers run in chunks of rows. Returns how many do.

    Left as they are: all MLPs without `gradient_checkpointing`, with re-entrant checkpointing (which stops nowhere), and with `torch_compile`;
    experts and whatever else is more than plain linears, LoRA on them and an activation. With `mlp_chunk_rows` None also those that would
    cost time: weights that are trained themselves, whose gradient each chunk would add to, and MLPs with a norm behind them (Gemma), where a
    layer that runs again has to go through its MLP.
    """
    for module in model.modules():
        # Of an earlier trainer's settings.
        if isinstance(vars(module).get("forward"), Chunked):
            del module.forward
    rows, recomputed = args.mlp_chunk_rows, cast(dict[str, Any], args.gradient_checkpointing_kwargs or {})
    if not args.gradient_checkpointing or rows == 0 or args.torch_compile or recomputed.get("use_reentrant"):
        return 0
    if rows is None and args.full_finetune:
        return 0
    chosen = [mlp for layer, mlp in _mlps(base_of(model).get_decoder()) if rows is not None or not _has_norm_after(layer)]
    for mlp in chosen:
        mlp.forward = Chunked(mlp, rows or CHUNK_ROWS)  # type: ignore[assignment]
    return len(chosen)


class Chunked:
    """An MLP's `forward` over chunks of at most `rows` of its input's rows (..., H), of equal size but for one row."""

    def __init__(self, mlp: nn.Module, rows: int) -> None:
        # An object and no closure: a copy of the model is to have its own MLP in here.
        self.mlp, self.rows = mlp, rows

    def __call__(self, hidden: Tensor) -> Tensor:
        count = -(-hidden.shape[:-1].numel() // self.rows)
        if count < 2 or _gathers_by_linear(self.mlp):
            return self._whole(hidden)
        chunks = hidden.flatten(0, -2).tensor_split(count)
        if torch.is_grad_enabled():
            with _taken_from(hidden, count):
                found = [checkpoint(self._whole, chunk, use_reentrant=False) for chunk in chunks]
        else:
            found = [self._whole(chunk) for chunk in chunks]
        return torch.cat(found).view(*hidden.shape[:-1], -1)

    def _whole(self, hidden: Tensor) -> Tensor:
        return type(self.mlp).forward(self.mlp, hidden)  # type: ignore[no-any-return]


class _Saved(torch.autograd.Function):
    """Saves a tensor before anything is computed from it; what it returns is kept for its `grad_fn` alone."""

    @staticmethod
    def forward(ctx: Any, _needs_gradient: Tensor, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        return hidden.new_empty(0)


def _taken_from(hidden: Tensor, count: int) -> saved_tensors_hooks:
    """Let the next `count` tensors that are saved, chunks of `hidden` in their order, be kept as their number.

    The layer's checkpoint sees one saved tensor before the chunks, and none after them. It gives it once in a backward pass, so it is held
    from the first chunk of this pass to the last.
    """
    saved = _Saved.apply(torch.empty(0, requires_grad=True), hidden.detach())
    numbers = iter(range(count))
    held: list[Tensor] = []
    taken: set[int] = set()

    def pack(_chunk: Tensor) -> int:
        return next(numbers)

    def unpack(number: int) -> Tensor:
        if not held:
            (whole,) = saved.grad_fn.saved_tensors
            held.extend(whole.flatten(0, -2).tensor_split(count))
        taken.add(number)
        chunk = held[number]
        if len(taken) == count:
            held.clear()
            taken.clear()
        return chunk

    return saved_tensors_hooks(pack, unpack)


def _gathers_by_linear(mlp: nn.Module) -> bool:
    """Whether each call of a linear brings its weights from other processes, as ZeRO-3 does.

    Chunks would bring them again, and processes whose batches differ in rows would have different numbers of calls and wait for ever.
    """
    return any(hasattr(each, "ds_id") for each in mlp.parameters()) or any(
        isinstance(each, FSDPModule) for each in mlp.children()
    )


def _mlps(decoder: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(layer, its MLP) of all layers that checkpoint and have an MLP that works row by row."""
    for layer in decoder.modules():
        if not hasattr(layer, "gradient_checkpointing"):
            continue
        for name in _NAMES:
            mlp = getattr(layer, name, None)
            if isinstance(mlp, nn.Module) and _by_rows(mlp):
                yield layer, mlp


def _by_rows(mlp: nn.Module) -> bool:
    """Whether a module takes one tensor and is made of plain linears, LoRA on them, and activations."""
    alone = len(inspect.signature(type(mlp).forward).parameters) == 2 and next(mlp.parameters(recurse=False), None) is None
    parts = list(mlp.children())
    linears = [part for part in parts if _is_linear(part)]
    return alone and len(linears) > 1 and all(part in linears or _is_activation(part) for part in parts)


def _is_linear(module: nn.Module) -> bool:
    # Not by isinstance: quantised linears and other adapters would do their work on the weights again for each chunk, or look at all rows.
    if type(module) is LoraLinear:
        return type(module.base_layer) is nn.Linear and not module.lora_variant
    return type(module) is nn.Linear


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ in ("transformers.activations", "torch.nn.modules.activation")


def _has_norm_after(layer: nn.Module) -> bool:
    return any(_NORM_AFTER.match(name) for name, _ in layer.named_children())
