"""A model's output head, used through its module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

ResultT = TypeVar("ResultT", bound=Tensor | tuple[Tensor, ...])


def through_head(head: nn.Module, compute: Callable[..., ResultT], *rows: Tensor) -> ResultT:
    """`compute(weight, bias, *rows)` as the forward of the head's module, in place of its own.

    Where weights are sharded over processes (DeepSpeed ZeRO-3, FSDP2), a module's weight is whole only between its hooks: before its forward
    and, where backward needs it, before its backward. Calling the module runs them.

        logps = through_head(model.lm_head, lambda weight, bias, rows: linear_logprobs(rows, weight, targets, bias=bias).logps, rows)

    Args:
        head: has a `weight` (V, H) and perhaps a `bias`, as `torch.nn.Linear`.
        compute: tensors, or a tuple of them; what backward is to go through must be among them.
        rows: tensors that need a gradient come in here rather than by closure.
    """
    own: Any = head.__dict__.get("forward")
    head.forward = lambda *rows: compute(head.weight, getattr(head, "bias", None), *rows)  # type: ignore[assignment]
    try:
        result: ResultT = head(*rows)
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own
    return result
