"""Training on a model in 4 bits: settings, adapters and models that cannot be, said before work starts."""

from __future__ import annotations

import os

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from mmdpo_trainers.models import quantized
from mmdpo_trainers.training.config import PreferenceConfig

_KNOWS_4_BITS = "Linear4bit"
"""What PEFT calls an adapter's layer that is made for bitsandbytes' 4-bit layers."""


def check_settings(args: PreferenceConfig) -> None:
    """ValueError for settings that a model with 4-bit weights cannot be trained with."""
    if args.full_finetune:
        raise ValueError(
            "full_finetune: the model's weights are in 4 bits and get no gradient; train an adapter on them, or load the model whole"
        )
    plugin = getattr(args, "deepspeed_plugin", None)
    sharded = (
        "fsdp" if args.fsdp or _launched_with_fsdp() else "deepspeed" if plugin is not None and plugin.zero_stage == 3 else None
    )
    if sharded is not None:
        raise ValueError(
            f"{sharded}: expected the whole model in each process with 4-bit weights, whose scales are no parameters and would not be in shards "
            "with them; use DDP or ZeRO-2, or load the model whole"
        )


def _launched_with_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_adapter(name: str, config: PeftConfig, model: nn.Module, rewriting: str | None) -> None:
    """ValueError naming an adapter's setting that would train, or rewrite, weights in 4 bits; nothing where the model has none.

    model: without the adapter, or with it. rewriting: the setting by which PEFT changes the weights under the adapter.
    """
    layers = quantized.quantized_layers(model)
    if not layers:
        return
    if rewriting is not None:
        raise ValueError(
            f"adapter {name}: {rewriting} changes the model's own layers, which are in 4 bits; take another start, or load the model whole"
        )
    for setting, kind in (("modules_to_save", ""), ("target_parameters", ".weight")):
        for wanted in getattr(config, setting, None) or ():
            found = next((layer for layer in layers if _reaches(wanted, f"{layer}{kind}")), None)
            if found is not None:
                raise ValueError(
                    f"adapter {name}: {setting}: expected whole weights, which alone get a gradient, got {wanted!r}, of which {found} is in "
                    "4 bits; leave it out, name it among llm_int8_skip_modules when the model is loaded, or put LoRA on it (target_modules)"
                )


def _reaches(wanted: str, name: str) -> bool:
    """Whether PEFT takes a module by the end of its name, or one that it lies in."""
    parts = name.split(".")
    return any(".".join(parts[:count]).endswith(wanted) for count in range(1, len(parts) + 1))


def check_layers(model: nn.Module) -> None:
    """ValueError where an adapter's layer around 4-bit weights is one that takes them for whole ones."""
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or not quantized.is_quantized(getattr(module.get_base_layer(), "weight", None)):
            continue
        if type(module).__name__ != _KNOWS_4_BITS:
            raise ValueError(
                f"adapter: expected a kind that PEFT has for 4-bit weights, such as LoRA, got "
                f"{type(module).__module__}.{type(module).__name__} at {name}; take another adapter, or load the model whole"
            )
