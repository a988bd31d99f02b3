"""The parts of a vision-language model that training touches one by one: body, head, pictures, what is trained."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import re
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from PIL import Image
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import set_seed

from mmdpo_trainers.models.families import EncodedImages, Family, family_of, tree_refusal
from mmdpo_trainers.models.quantized import float_dtype
from mmdpo_trainers.training.batches.collator import PreferenceBatch
from mmdpo_trainers.training.config import PreferenceConfig
from mmdpo_trainers.training.sharded.sharding import through_root

logger = logging.getLogger(__name__)

_SIDE = 56
"""Of a blank picture, in pixels."""


def base_of(model: nn.Module) -> Any:
    """The transformers model, inside PEFT or not."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def vision_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the vision tower, without a projector that lies inside it."""
    projector = set(projector_parameters(model))
    return [parameter for parameter in _part_parameters(model, family_of(model).vision) if parameter not in projector]


def projector_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of what brings the vision tower's features to the language model."""
    return _part_parameters(model, family_of(model).projector)


def image_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that a picture's features depend on."""
    family = family_of(model)
    return _part_parameters(model, (*family.vision, *family.projector))


def sees_as_reference(model: nn.Module) -> bool:
    """Whether vision tower and projector give the policy what they give it with its adapter off: not trained, no adapter on them."""
    body, family = base_of(model).base_model, family_of(model)
    modules = dict(body.named_modules())
    parts = [modules[name] for name in (*family.vision, *family.projector) if name in modules]
    adapted = any(isinstance(module, BaseTunerLayer) for part in parts for module in part.modules())
    return not adapted and not any(parameter.requires_grad for parameter in image_parameters(model))


def skips_images(model: nn.Module) -> bool:
    """Whether a step without pictures leaves weights that are trained without a gradient."""
    return family_of(base_of(model)).cross_attention or any(parameter.requires_grad for parameter in image_parameters(model))


def has_experts(model: nn.Module) -> bool:
    """Whether a step leaves weights without a gradient where its tokens take other experts."""
    text = base_of(model).config.get_text_config()
    return any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"))


def shares_keys(model: nn.Module) -> bool:
    """Whether layers take keys and values of earlier layers, beside the hidden states that checkpointing knows of."""
    return bool(getattr(base_of(model).config.get_text_config(), "num_kv_shared_layers", 0))


def _part_parameters(model: nn.Module, names: tuple[str, ...]) -> list[nn.Parameter]:
    """Parameters of the parts with these names below the base model."""
    inside = tuple(f"{name}." for name in names)
    named = base_of(model).base_model.named_parameters()
    return [parameter for name, parameter in named if name in names or name.startswith(inside)]


def language_linears(model: nn.Module) -> tuple[str, list[str]]:
    """Name of the language tower in the model, and the last parts of the names of its linears; lm_head is none of them."""
    decoder = base_of(model).get_decoder()
    prefix = next(name for name, module in base_of(model).named_modules() if module is decoder)
    return prefix, sorted({name.rsplit(".", 1)[-1] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)})


def lora_config(model: nn.Module, args: PreferenceConfig) -> LoraConfig:
    """LoRA as `args` describes it; `language` becomes a regular expression over the language tower's linears without lm_head."""
    target = args.lora_target
    if target == "language":
        prefix, leaves = language_linears(model)
        target = rf"{re.escape(prefix)}\..*\.({'|'.join(map(re.escape, leaves))})"
    return LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=0.0, target_modules=target, task_type="CAUSAL_LM")


def packs_trees(model: nn.Module, args: PreferenceConfig) -> bool:
    """Whether micro-batches are packed to token trees: where `args` says so and that is exact, else why not is logged.

    Raises ValueError where `args` has settings that only token trees can keep.
    """
    reason = tree_refusal(model) if args.tree_packing else None
    if reason is None:
        return args.tree_packing
    for name in ("max_tokens_per_batch", "group_by_pictures"):
        if getattr(args, name):
            raise ValueError(f"{name}: it needs token trees, which are not exact with this model, as {reason}; leave it out")
    logger.warning(
        "token trees are not exact with this model, as %s: sequences run as padded rows, their prompts unshared", reason
    )
    return False


def second_model(
    model: nn.Module, args: PreferenceConfig, peft_config: PeftConfig | None, ref_model: nn.Module | None
) -> nn.Module | None:
    """The reference model where it is not the policy with its adapter switched off, or None. Frozen, in evaluation mode.

    Raises ValueError where `full_finetune` comes with an adapter.
    """
    if ref_model is model:
        raise ValueError("ref_model: expected a second model, got the policy itself; leave it out")
    if ref_model is None and args.full_finetune and args.needs_reference:
        ref_model = copy.deepcopy(model)
    if args.full_finetune and (peft_config is not None or isinstance(model, PeftModel)):
        raise ValueError("full_finetune: expected a plain model and no peft_config; train an adapter with full_finetune=False")
    return None if ref_model is None else ref_model.eval().requires_grad_(False)


def make_trainable(model: nn.Module, args: PreferenceConfig, peft_config: PeftConfig | None) -> nn.Module:
    """The policy: the model with an adapter, or itself with what is to stay as it is frozen.

    Raises ValueError where model, `args` and `peft_config` do not fit, or nothing would be trained.
    """
    recomputed: Any = args.gradient_checkpointing_kwargs or {}
    if args.gradient_checkpointing and recomputed.get("use_reentrant") and shares_keys(model):
        raise ValueError(
            "gradient_checkpointing_kwargs: re-entrant checkpointing gives no gradient to keys and values that later layers of this model take "
            "from earlier ones; set use_reentrant: false, or leave it out"
        )
    if args.full_finetune:
        parts = (args.freeze_vision, vision_parameters(model)), (args.freeze_projector, projector_parameters(model))
        for frozen, parameters in parts:
            for parameter in parameters:
                parameter.requires_grad_(not frozen)
    else:
        model = _with_adapter(model, args, peft_config)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        remedy = "load it with is_trainable=True" if isinstance(model, PeftModel) else "unfreeze what is to be trained"
        raise ValueError(f"model: expected parameters that require a gradient, got none; {remedy}")
    return model


def adapters(model: nn.Module, args: PreferenceConfig, peft_config: PeftConfig | None) -> dict[str, PeftConfig]:
    """The adapters that the policy has or is to get, by name. Raises ValueError where there would be two."""
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise ValueError(
            f"peft_config: expected one of PEFT's configurations, such as LoraConfig, got {type(peft_config).__name__}"
        )
    if not isinstance(model, PeftModel):
        return {"default": peft_config or lora_config(model, args)}
    if peft_config is not None:
        raise ValueError("peft_config: the model has an adapter already; pass the base model, or leave peft_config out")
    return dict(model.peft_config)


def _with_adapter(model: nn.Module, args: PreferenceConfig, peft_config: PeftConfig | None) -> PeftModel:
    if not isinstance(model, PeftModel):
        (found,) = adapters(model, args, peft_config).values()
        # The adapter's first weights are a part of the run's seed.
        set_seed(args.seed)
        model = get_peft_model(model, found)
    if args.gradient_checkpointing:
        # Re-entrant checkpointing gives no gradient to layers whose inputs need none.
        model.enable_input_require_grads()
    return model


@contextlib.contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """The model without its adapters, all parameters left as they are.

    PEFT's `disable_adapter` changes what requires a gradient, too, which sharding (FSDP2) does not see a second time.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off


def compile_decoder(model: nn.Module, args: PreferenceConfig) -> None:
    """Compile the language model's layers in place, as `torch_compile` asks for; head and losses are operators already."""
    base_of(model).get_decoder().compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)


def image_features(model: nn.Module, batch: PreferenceBatch) -> list[Tensor]:
    """Per distinct picture what its image tokens stand for, see `Family.features`. With a gradient where vision or projector is trained."""
    if batch.pictures is None:
        return []
    body = base_of(model).base_model
    trained = any(parameter.requires_grad for parameter in image_parameters(model))
    dtype = float_dtype(body)
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.pictures.inputs.items()}
    pictures, family = dataclasses.replace(batch.pictures, inputs=inputs), family_of(model)
    with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
        if next(body.parameters(recurse=False), None) is None:
            return family.features(body, pictures)
        # Parameters of the body itself, such as LLaVA-NeXT's newline, are gathered by ZeRO-3 for a forward of the body only; in one tensor, as
        # it counts a module's outputs, of which all processes must have as many.
        joined = through_root(body, body, lambda: torch.cat(family.features(body, pictures)))
        return list(joined.split(pictures.tokens))


def blank_image(family: Family, processor: Any) -> EncodedImages:
    """A small black picture as the model takes it, for a process whose micro-batch has none where another's has."""
    return family.encode_images(processor, [Image.new("RGB", (_SIDE, _SIDE))])


def features_of_blank(model: nn.Module, batch: PreferenceBatch, blank: EncodedImages) -> tuple[list[Tensor], Tensor | None]:
    """Run a blank picture through the vision tower in place of a batch's own, of which it has none.

    Returns its features for `hidden_states`, where no token stands for them, and a zero to add to what backward goes through,
    so that all weights of the tower get gradients, of zeros; None: they are not trained.

    With features in hand a model runs the same modules in the same order as on a batch with pictures, cross-attention layers included, which
    ZeRO-3 expects of all processes.
    """
    found = image_features(model, dataclasses.replace(batch, pictures=blank).to(batch.input_ids.device))
    parts = [each.float().sum() for each in pytree.tree_leaves(found) if isinstance(each, Tensor) and each.requires_grad]
    return found, torch.stack(parts).sum() * 0 if parts else None


def hidden_states(model: nn.Module, batch: PreferenceBatch, features: list[Tensor]) -> Tensor:
    """(B, S, H) last hidden states, before the head. features: as `image_features` gives them."""
    inputs: dict[str, Any] = {"attention_mask": batch.attention_mask, "use_cache": False}
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    body, family = base_of(model).base_model, family_of(model)
    if batch.answers is not None:
        inputs |= family.answer_types(batch.answers)
    return family.hidden_states(body, batch.input_ids, features, batch.feature_rows, **inputs)
