"""Work on a model's parts as one forward of its outermost wrapper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

ResultT = TypeVar("ResultT", bound=Tensor | tuple[Tensor, ...])


def through_root(wrapped: nn.Module, root: nn.Module, compute: Callable[[], ResultT]) -> ResultT:
    """`compute()` as the forward of `root`, called by way of `wrapped`.

    DDP readies its reducer in its own forward, DeepSpeed and FSDP2 gather weights in hooks round a module's: bodies and heads that are
    called one by one, past the outermost module, run without them. `root.forward` is replaced for this one call and is itself again while
    `compute` runs, whatever autocast or PEFT made of it.

    Args:
        wrapped: what training prepared: DDP, a DeepSpeed engine, an FSDP2 module, or `root` itself; compiled or not.
        root: the module inside of it, that `compute` works with.
        compute: what backward is to go through must be among what it returns: a tensor, or a tuple of them.
    """
    # `compute` is another function each time, which `torch.compile` would have to compile each time: what is compiled is in the model.
    wrapped = getattr(wrapped, "_orig_mod", wrapped)
    own: Any = root.__dict__.get("forward")

    def restore() -> None:
        if own is not None:
            root.forward = own
        elif "forward" in root.__dict__:
            del root.forward

    def forward(*args: Any, **kwargs: Any) -> ResultT:
        restore()
        return compute()

    root.forward = forward  # type: ignore[assignment]
    try:
        result: ResultT = wrapped()
    finally:
        restore()
    return result
