"""How a training is spread over processes: plain copies (DDP, ZeRO-2), or weights in shards (ZeRO-3, FSDP2), and all in one forward."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from mmdpo_kernels.decoder_layers import carries

ResultT = TypeVar("ResultT", bound=Tensor | tuple[Tensor, ...])


class Sharding:
    """What of a trainer's set-up differs between DDP, DeepSpeed and FSDP2.

    Raises ValueError for what this package does not run under: FSDP 1, and processes that share a batch (tensor, context or sequence parallel).
    """

    def __init__(self, trainer: Trainer) -> None:
        if not torch.cuda.is_available():
            # DeepSpeed, which accelerate imports where it is installed, would say on standard output that it found no GPU.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        self.trainer, self.accelerator = trainer, trainer.accelerator
        state = self.accelerator.state
        self.fsdp: Any = state.fsdp_plugin if trainer.is_fsdp_enabled else None
        self.deepspeed: Any = state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
        if self.fsdp is not None and self.fsdp.fsdp_version != 2:
            raise ValueError(
                f"fsdp: expected version 2, got {self.fsdp.fsdp_version}; set fsdp_version: 2 in accelerate's configuration "
                "(`mmdpo init accelerate` writes one that has it)"
            )
        shared = {name: getattr(trainer, f"get_{name}_size")() for name in ("tp", "cp", "sp")}
        if any(size > 1 for size in shared.values()):
            raise ValueError(
                f"parallelism: every process has batches of its own here, got {shared}; use DDP, ZeRO or FSDP2 alone"
            )
        self._policy = None if self.fsdp is None else self.fsdp.auto_wrap_policy
        self._named_layers = None if self.fsdp is None else self.fsdp.transformer_cls_names_to_wrap
        self._name_layers(trainer.model)
        self._gather_at_once(cast(nn.Module, trainer.model))
        if self.fsdp is not None and self.fsdp.mixed_precision_policy is not None:
            # Log-probabilities leave the model in float32 and must not be rounded to 16 bits; nor should sums of gradients.
            policy = self.fsdp.mixed_precision_policy
            self.fsdp.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None, reduce_dtype=None)

    @property
    def in_shards(self) -> bool:
        """Whether a weight is whole only while its module runs."""
        return self.fsdp is not None or (self.deepspeed is not None and self.deepspeed.zero_stage == 3)

    def frozen(self, model: nn.Module) -> nn.Module:
        """A model that is not trained, in shards where the trained one is. Returns what to call; the module inside stays `model`."""
        if self.fsdp is not None:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            self._name_layers(model)
            self.fsdp.set_auto_wrap_policy(model)
            wrapped: nn.Module = fsdp2_prepare_model(self.accelerator, model)
            self._name_layers(self.trainer.model)
            return wrapped
        if self.in_shards:
            import deepspeed

            self._gather_at_once(model)
            engine, *_ = deepspeed.initialize(model=model, config=self._frozen_config())
            return engine.eval()  # type: ignore[no-any-return]
        return model.to(self.trainer.args.device)

    def complete_optimizer(self, optimizer: Any) -> None:
        """Give every weight a state before FSDP2's optimizer is saved, where none has a gradient: PyTorch reads one for each weight back.

        It is the state of no step taken, so what follows is what would have followed. To be called between steps.
        """
        if self.fsdp is None:
            return
        inner: Any = getattr(optimizer, "optimizer", optimizer)
        without = [p for group in inner.param_groups for p in group["params"] if not inner.state.get(p)]
        if not without:
            return
        rates = [group["lr"] for group in inner.param_groups]
        for group in inner.param_groups:
            group["lr"] = 0.0
        for parameter in without:
            parameter.grad = torch.zeros_like(parameter)
        inner.step()
        for parameter in without:
            parameter.grad = None
            steps = inner.state[parameter].get("step")
            if isinstance(steps, torch.Tensor):
                steps.zero_()
        for group, rate in zip(inner.param_groups, rates, strict=True):
            group["lr"] = rate

    def inside(self, wrapped: nn.Module) -> nn.Module:
        """The module within DDP's or DeepSpeed's wrapper; FSDP2 has none."""
        return self.accelerator.unwrap_model(wrapped, keep_torch_compile=False)  # type: ignore[no-any-return]

    def _name_layers(self, model: Any) -> None:
        """Tell FSDP2 the layers to shard one by one: those that the user named, or of those that transformers names the ones that are there.

        transformers names layers for whole model families, such as the text half of CLIP, and accelerate refuses what a model lacks.
        """
        if self.fsdp is not None and not self._named_layers:
            there = {type(module).__name__.removeprefix("FSDP") for module in model.modules()}
            self.fsdp.transformer_cls_names_to_wrap = sorted(there.intersection(getattr(model, "_no_split_modules", None) or ()))
            self.fsdp.auto_wrap_policy = self._policy

    def _gather_at_once(self, model: nn.Module) -> None:
        """Tell ZeRO-3 to gather a layer that carries a state as one. Its parts run once for each batch of a tree's nodes, as often as the
        tree of a process asks for, and processes gather a weight together."""
        found = [module for module in model.modules() if carries(module)]
        if self.deepspeed is None or not self.in_shards or not found:
            return
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, list({type(module) for module in found}))
        for module in found:
            module.register_forward_pre_hook(_input_by_place, with_kwargs=True)

    def _frozen_config(self) -> dict[str, Any]:
        config = self.deepspeed.deepspeed_config
        zero = {
            name: value
            for name, value in config["zero_optimization"].items()
            if value != "auto" and name not in ("offload_optimizer", "zero_hpz_partition_size")
        }
        found: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        for name in ("bf16", "fp16"):
            if config.get(name, {}).get("enabled") is True:
                found[name] = {"enabled": True}
        return found


@contextlib.contextmanager
def whole_shapes(model: nn.Module) -> Iterator[None]:
    """While a model is saved, let it say its weights' whole shapes when it is asked for a weight by name.

    transformers saves some weights transposed, such as those of experts, and tells by the shape whether they are already; a shard of
    ZeRO-3 has another, and square weights would be saved the wrong way round.
    """
    own = model.get_parameter

    def get_parameter(name: str) -> Tensor | nn.Parameter:
        found = own(name)
        shape = getattr(found, "ds_shape", None)
        return found if shape is None else torch.empty(shape, dtype=found.dtype, device="meta")

    model.get_parameter = get_parameter  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del model.get_parameter


def _input_by_place(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A layer's input as its first argument, with a gradient: ZeRO-3 takes the layer's backward to be over when the gradients of its
    arguments without names are known, and where there are none, when it begins."""
    rest = dict(kwargs)
    if args or "hidden_states" not in rest:
        return None
    hidden = rest.pop("hidden_states")
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    return (hidden,), rest


def check_whole(model: nn.Module, purpose: str) -> None:
    """ValueError where DeepSpeed sharded the weights while they were read, before `purpose` saw them whole."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            f"{purpose}: expected whole weights, got some that DeepSpeed sharded while they were read; read them with "
            "mmdpo_trainers.models.loading.load_model, before PreferenceConfig is made, or under mmdpo_trainers.models.whole_weights"
        )


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
