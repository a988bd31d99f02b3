"""The load-balancing loss of mixture-of-experts models (TRL's `router_aux_loss_coef`), taken from their routers as they run.

Which modules are routers, and where in their output the logits are, is what transformers itself records by (`_can_record_outputs`). Its
recorder is not used: what it records under re-entrant gradient checkpointing has no gradient. Here the loss's gradient enters where a router
runs with one, in the forward or in its recomputation, so it is the same under both kinds of checkpointing and under none, and of the
logits only sums are kept.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mmdpo_kernels.load_balancing import RoutingSums
from mmdpo_trainers.training import model_parts
from mmdpo_trainers.training.config import PreferenceConfig

logger = logging.getLogger(__name__)


def coefficient(model: nn.Module, args: PreferenceConfig) -> float:
    """The load-balancing loss's factor: that of `args`, or what the model's own configuration says; 0: there is no such loss."""
    found, reason = _asked(model, args), refusal(model)
    if found and reason is not None:
        logger.warning("router_aux_loss_coef: %s of the model's configuration is not used, as %s", found, reason)
        return 0.0
    return found


def check(model: nn.Module, args: PreferenceConfig) -> None:
    """ValueError where there is to be a load-balancing loss that cannot be taken; what only the model's configuration says may be left out."""
    given, found, reason = args.router_aux_loss_coef, _asked(model, args), refusal(model)
    if found and reason is None and args.torch_compile:
        raise ValueError(
            f"router_aux_loss_coef: a compiled model's routers are not observed, and the coefficient is {found}"
            f"{'' if given is not None else ', of the model configuration'}; set it to 0, or leave torch_compile out"
        )
    if given and reason is not None:
        raise ValueError(
            f"router_aux_loss_coef: expected a mixture-of-experts model that has a load-balancing loss, got {given} for "
            f"{type(model_parts.base_of(model)).__name__}: {reason}; leave it out, or set it to 0"
        )


def _asked(model: nn.Module, args: PreferenceConfig) -> float:
    given = args.router_aux_loss_coef
    text = model_parts.base_of(model).config.get_text_config()
    return float((getattr(text, "router_aux_loss_coef", None) or 0.0) if given is None else given)


def refusal(model: nn.Module) -> str | None:
    """Why a model's load-balancing loss cannot be taken, or None where it can."""
    base = model_parts.base_of(model)
    tower, text = base.get_decoder(), base.config.get_text_config()
    if not model_parts.has_experts(model):
        return "its layers have no experts"
    if not hasattr(sys.modules[type(tower).__module__], "load_balancing_loss_func"):
        return "transformers has no load-balancing loss for it"
    if not isinstance(getattr(text, "num_experts_per_tok", None), int):
        return "its configuration does not say how many experts a token takes (num_experts_per_tok)"
    return None if routers(model) else "transformers does not record its routers"


def routers(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """The modules of the language tower that route, layer by layer, and the place of the logits in what each returns.

    A router with an adapter on it is the adapter's layer.
    """
    tower: Any = model_parts.base_of(model).get_decoder()
    recorded = (getattr(tower, "_can_record_outputs", None) or {}).get("router_logits", ())
    found: list[tuple[nn.Module, int]] = []
    adapted: list[str] = []
    for name, module in tower.named_modules():
        if any(name.startswith(f"{outer}.") for outer in adapted):
            continue
        inner = module
        if isinstance(module, BaseTunerLayer):
            adapted.append(name)
            inner = module.get_base_layer()
        for spec in recorded if isinstance(recorded, list | tuple) else (recorded,):
            # A bare class stands for the second of its outputs, in transformers.
            kind, index = getattr(spec, "target_class", spec), getattr(spec, "index", 1)
            layer = getattr(spec, "layer_name", None)
            if isinstance(kind, type) and isinstance(inner, kind) and (layer is None or f".{layer}." in f".{name}."):
                found.append((module, index))
    return found


class RouterLoss:
    """Takes the load-balancing loss of a model in training. It stays with the model: hooks that do nothing outside of `taken`.

    Raises ValueError, in `taken`, where a router gives no row for each token.
    """

    def __init__(self, model: nn.Module) -> None:
        self.top_k = int(model_parts.base_of(model).config.get_text_config().num_experts_per_tok)
        self._open: RoutingSums | None = None
        """Of the forward that runs."""
        self._replayed: _Taken | None = None
        """Of the backward that runs, whose routers may run once more."""
        self._taken: _Taken | None = None
        for module, index in routers(model):
            module.register_forward_hook(functools.partial(self._observe, index))

    @contextlib.contextmanager
    def taken(self, counts: Tensor) -> Iterator[_Taken]:
        """While the block runs the model, over tokens with these `counts` (B, S), see `PreferenceBatch.sequence_counts`."""
        self._taken = taken = _Taken(self, RoutingSums(self.top_k, counts))
        self._open = taken.sums
        try:
            yield taken
        finally:
            self._open = self._taken = None

    def _observe(self, index: int, module: nn.Module, args: Any, output: Any) -> Any:
        """A router's forward hook."""
        taken = self._taken or self._replayed
        if taken is None:
            return None
        outputs = output if isinstance(output, tuple) else (output,)
        logits = outputs[index if isinstance(output, tuple) else 0]
        if self._open is not None:
            self._open.add(logits.detach())
        if not (torch.is_grad_enabled() and logits.requires_grad):
            return None
        # The gradient enters beside what the experts' outputs are weighted by: nothing else need look at the logits.
        carrier = next((each for each in outputs if _carries(each) and each is not logits), logits)
        changed = tuple(_Enter.apply(each, logits, taken) if each is carrier else each for each in outputs)
        return changed if isinstance(output, tuple) else changed[0]

    def _replay(self, taken: _Taken) -> None:
        """Let routers know, until the backward that runs has ended, which forward they run once more."""
        self._replayed = taken
        torch.autograd.Variable._execution_engine.queue_callback(self._end_replay)  # type: ignore[attr-defined]

    def _end_replay(self) -> None:
        self._replayed = None


class _Taken:
    """The loss of one forward."""

    def __init__(self, owner: RouterLoss, sums: RoutingSums) -> None:
        self.owner, self.sums = owner, sums
        self.scale: Tensor | None = None
        """Gradient of the loss that is trained for this one, once backward has come here."""

    def beside(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The last hidden states, and the loss. Backward goes through both, and so through here before any layer."""
        return _Leave.apply(hidden, self)  # type: ignore[no-any-return]


class _Leave(torch.autograd.Function):
    """The loss leaves the model; in backward its upstream gradient is noted for the routers."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, taken: _Taken) -> tuple[Tensor, Tensor]:
        ctx.taken = taken
        return hidden.view_as(hidden), taken.sums.loss()

    @staticmethod
    def backward(ctx: Any, grad_hidden: Tensor, grad_loss: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.taken.scale = grad_loss
        ctx.taken.owner._replay(ctx.taken)
        return grad_hidden, None


class _Enter(torch.autograd.Function):
    """A tensor as it is; in backward the loss's gradient goes into the logits beside it."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, logits: Tensor, taken: _Taken) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.taken = taken
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        (logits,) = ctx.saved_tensors
        taken: _Taken = ctx.taken
        if taken.scale is None:
            return grad, None, None
        return grad, (taken.sums.gradient(logits) * taken.scale).to(logits.dtype), None


def _carries(output: Any) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and output.requires_grad
