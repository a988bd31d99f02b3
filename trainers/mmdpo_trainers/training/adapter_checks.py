"""Adapters that training can go on with: they act in the modules that are trained, and the model with them off is the model as it came."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from PIL import Image
from torch import Tensor, nn

from mmdpo_trainers.models.quantized import float_dtype
from mmdpo_trainers.processes import collectives
from mmdpo_trainers.training import head, model_parts, quantized_models
from mmdpo_trainers.training.batches.collator import PreferenceBatch, PreferenceCollator
from mmdpo_trainers.training.config import PreferenceConfig

_OUTSIDE = {
    "ADALORA": "the allocation of ranks and the regulariser",
    "ADAPTION_PROMPT": "the prompts in front of the attention layers",
    "POLY": "the choice of skills by task",
    "SHADOW": "the second model beside the layers",
    "XLORA": "the mixture of adapters",
}
"""Kinds of adapter of which a part is no layer of the model, but PEFT's own forward."""

_REMEDY = "pass ref_model, a second model with the weights as they are loaded, or take another adapter"


def policy(
    model: nn.Module,
    args: PreferenceConfig,
    peft_config: PeftConfig | None,
    collator: PreferenceCollator,
    *,
    has_reference: bool,
) -> nn.Module:
    """The model to train, see `model_parts.make_trainable`, with an adapter whose being off is the reference where that is needed.

    collator: of padded rows. has_reference: whether the reference is a second model. Raises ValueError for an adapter that does not fit.
    """
    if args.full_finetune:
        return model_parts.make_trainable(model, args, peft_config)
    off_is_reference = args.needs_reference and not has_reference
    for name, config in model_parts.adapters(model, args, peft_config).items():
        check_kind(name, config, off_is_reference=off_is_reference)
        quantized_models.check_adapter(name, config, model, _rewriting(config))
    measured = AdapterOff(model, collator) if off_is_reference else None
    plain = not isinstance(model, PeftModel)
    trained: Any = model_parts.make_trainable(model, args, peft_config)
    try:
        head.check_head(trained)
        quantized_models.check_layers(trained)
        if measured is not None:
            measured.check(trained)
    except ValueError:
        if plain:
            # The model is the user's, who may go on with another adapter.
            trained.unload()
        raise
    return trained  # type: ignore[no-any-return]


def check_kind(name: str, config: PeftConfig, *, off_is_reference: bool) -> None:
    """ValueError naming the adapter's setting where training could not train it, or not from the same reference.

    off_is_reference: whether the reference is the model with its adapter off.
    """
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    outside = "the virtual tokens in front of the prompt" if config.is_prompt_learning else _OUTSIDE.get(kind)
    if getattr(config, "alora_invocation_tokens", None):
        kind, outside = "alora_invocation_tokens", "the place from which the adapter acts"
    if outside is not None:
        raise ValueError(
            f"adapter {name}: {kind} does {outside} in PEFT's own forward, which token trees do not go through, so nothing or something else "
            "would be trained; use an adapter of the layers, such as LoRA"
        )
    for field, value in vars(config).items():
        if "dropout" in field and isinstance(value, float) and value:
            raise ValueError(f"adapter {name}: expected {field} 0, got {value}; policy and reference would differ by it")
    for field, noisy in (("peft_type", kind == "PVERA"), ("monteclora_config", getattr(config, "monteclora_config", None))):
        if noisy:
            raise ValueError(
                f"adapter {name}: {field}: expected an adapter without noise, got one that samples its update in training "
                f"({kind}); policy and reference would differ by it"
            )
    bias = getattr(config, "bias", "none")
    if bias != "none":
        raise ValueError(f"adapter {name}: expected bias 'none', got {bias!r}; it would train the reference's own biases")
    rewriting = _rewriting(config) if off_is_reference else None
    if rewriting is not None:
        raise ValueError(
            f"adapter {name}: {rewriting} changes the model's own layers, so the model with its adapter off is not the reference; {_REMEDY}"
        )


def _rewriting(config: PeftConfig) -> str | None:
    """The setting by which PEFT changes the weights under an adapter when it puts it in; None: there is none."""
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        return f"init_lora_weights={start!r}"
    return next((field for field in ("kasa_config", "layer_replication") if getattr(config, field, None)), None)


def check_plain(model: nn.Module) -> None:
    """ValueError where there are adapter layers in a model that no `PeftModel` is around: an earlier trainer's, mostly."""
    if isinstance(model, PeftModel):
        return
    found = next((each for each, m in model.named_modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)), None)
    if found is not None:
        raise ValueError(
            f"model: it has an adapter in it already (at {found}), of an earlier trainer or of PEFT; pass that trainer's `model`, a "
            "PeftModel, to train the adapter on, or load the model again to start from its weights"
        )


class AdapterOff:
    """Measures whether a model with its adapter off computes what it computed before, on a picture and a few words.

    Where an adapter is to be put in, made before that: what it compares with is the model as it came. Made of a PEFT model, it is that
    model with its adapter off, and only what training does to it can be seen. Weights in shards, or not there yet, cannot be looked at.

    Two small forward passes, on the device that the model is on.
    """

    def __init__(self, model: nn.Module, collator: PreferenceCollator) -> None:
        whole = not any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in model.parameters())
        self._batch = probe(collator).to(next(model.parameters()).device) if whole else None
        self._before = self._logits(model)

    def check(self, model: PeftModel) -> None:
        """ValueError, in all processes, where the model with its adapter off, whatever is trained, is another than before."""
        reason = None
        if self._before is not None:
            with _moved(model):
                after = self._logits(model)
            assert after is not None
            difference = float((after - self._before).norm() / self._before.norm())
            if difference > max(2 * torch.finfo(float_dtype(model_parts.base_of(model))).eps, 1e-5):
                reason = f"differ by {difference:.2g} of their size"
        reason = next((each for each in collectives.all_gather(reason) if each is not None), None)
        if reason is not None:
            kinds = ", ".join(f"{name} ({_setting(config)})" for name, config in model.peft_config.items())
            raise ValueError(
                f"adapter {kinds}: with it off, and its weights moved as training does, the model's log-probabilities {reason} from "
                f"what they were, so it cannot be the reference; {_REMEDY}. The model's weights may have been changed: load it again"
            )

    def _logits(self, model: nn.Module) -> Tensor | None:
        """(U, V) log-probabilities of the reference, float32."""
        if self._batch is None:
            return None
        off = model_parts.adapter_off(model) if isinstance(model, PeftModel) else contextlib.nullcontext()
        with torch.no_grad(), _evaluated(model), off:
            return probe_logps(model, self._batch)


def probe(collator: PreferenceCollator) -> PreferenceBatch:
    """A batch of one record, a few words about a small picture."""
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    record = {
        "id": "probe",
        "images": [picture],
        "prompt": "<image>\nWhat is in it?",
        "chosen": "A red circle.",
        "rejected": "No.",
    }
    return collator.batch([record])


def probe_logps(model: nn.Module, batch: PreferenceBatch) -> Tensor:
    """(U, V) log-probabilities at the distinct rows that predict response tokens, float32, without what is not finite."""
    hidden = model_parts.hidden_states(model, batch, model_parts.image_features(model, batch))
    output: Any = model_parts.base_of(model).get_output_embeddings()
    logits = output(head.scored_rows(hidden, batch).to(output.weight.dtype))
    return logits.float().log_softmax(-1).nan_to_num(0.0, 0.0, 0.0)


@contextlib.contextmanager
def _moved(model: nn.Module) -> Iterator[None]:
    """The model with all that is trained in it changed, as a step would."""
    kept = {parameter: parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad}
    try:
        with torch.no_grad():
            for parameter in kept:
                parameter.add_(0.1)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept.items():
                parameter.copy_(value)


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _setting(config: PeftConfig) -> str:
    values: Mapping[str, Any] = vars(config)
    shown = [
        f"{name}={values[name]!r}"
        for name in ("init_lora_weights", "init_weights", "modules_to_save")
        if values.get(name) is not None
    ]
    return " ".join([str(getattr(config.peft_type, "value", config.peft_type)), *shown])
