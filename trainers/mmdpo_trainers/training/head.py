"""A model's output head over the rows of a batch that predict response tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from mmdpo_kernels import linear_logprobs, sequence_logps, through_head
from mmdpo_trainers.models.families import family_of
from mmdpo_trainers.models.quantized import is_quantized
from mmdpo_trainers.training import model_parts
from mmdpo_trainers.training.batches.collator import PreferenceBatch
from mmdpo_trainers.training.model_parts import base_of


def check_head(model: nn.Module) -> None:
    """ValueError where the output head is quantised, or has an adapter that is more than a matrix added to its weight, as plain LoRA is."""
    head: Any = base_of(model).get_output_embeddings()
    if is_quantized(_module(head).weight):
        raise ValueError(
            "output head: expected whole weights, of which log-probabilities are made, got quantised ones; load the model with its head among "
            "llm_int8_skip_modules, as mmdpo_trainers.models.loading.load_model does"
        )
    kind = None
    if isinstance(head, LoraLayer):
        names = [*head.lora_variant, *(name for name, used in head.lora_bias.items() if used)]
        if names:
            kind = f"adapter {names[0]} with use_dora, lora_bias or another variant of LoRA"
    elif isinstance(head, BaseTunerLayer | TrainableTokensWrapper):
        kind = type(head).__name__
    if kind is not None:
        raise ValueError(f"output head: expected no adapter or plain LoRA, got {kind}; leave the head out of target_modules")


def heads_alike(model: nn.Module) -> bool:
    """Whether the head gives the policy what it gives it with its adapter off: not trained, no adapter on it."""
    head = base_of(model).get_output_embeddings()
    adapted = isinstance(head, BaseTunerLayer | AuxiliaryTrainingWrapper)
    return not adapted and not any(parameter.requires_grad for parameter in head.parameters())


def scored_rows(hidden: Tensor, batch: PreferenceBatch) -> Tensor:
    """(U, H), the distinct rows of hidden states (B, S, H) that predict response tokens."""
    return hidden.flatten(0, 1)[batch.shared_rows.rows]


def token_logps(model: nn.Module, rows: Tensor, batch: PreferenceBatch) -> Tensor:
    """(R,) log-probabilities of the response tokens, as `batch.targets` has them. rows: as `scored_rows` gives them."""
    return _through(model, rows, batch)[0]


def token_logps_beside(
    model: nn.Module, rows: Tensor, batch: PreferenceBatch, reference_rows: Tensor, reference_batch: PreferenceBatch
) -> tuple[Tensor, Tensor]:
    """The policy's log-probabilities (R,), and the reference's (R',) from the same products; for a head that is frozen and the same."""
    policy, reference = _through(model, rows, batch, reference_rows, reference_batch)
    return policy, reference


def response_logps(model: nn.Module, hidden: Tensor, batch: PreferenceBatch) -> Tensor:
    """(n, b) log-probabilities of each record's responses by branch, as `sequence_logps` sums them. hidden: (B, S, H)."""
    return summed(token_logps(model, scored_rows(hidden, batch), batch), batch)


def summed(logps: Tensor, batch: PreferenceBatch) -> Tensor:
    """(n, b) sums of a batch's (R,) token log-probabilities, over each response."""
    return sequence_logps(logps, batch.lengths.flatten(), weights=batch.token_weights).view(-1, len(batch.branches))


@torch.no_grad()
def batch_logps(model: nn.Module, batch: PreferenceBatch) -> Tensor:
    """(n, b) log-probabilities of a whole batch as `response_logps` gives them, without a gradient."""
    hidden = model_parts.hidden_states(model, batch, model_parts.image_features(model, batch))
    return response_logps(model, hidden, batch)


def _through(
    model: nn.Module,
    rows: Tensor,
    batch: PreferenceBatch,
    reference_rows: Tensor | None = None,
    reference_batch: PreferenceBatch | None = None,
) -> tuple[Tensor, ...]:
    base = base_of(model)
    head, options = base.get_output_embeddings(), _logit_options(base)

    def compute(_weight: Any, _bias: Any, rows: Tensor, *reference: Tensor) -> tuple[Tensor, ...]:
        inner = _module(head)
        weight, bias = _adapted(head, inner.weight), getattr(inner, "bias", None)  # type: ignore[arg-type]
        mine = batch.shared_rows
        rows, beside = rows.to(weight.dtype), [each.to(weight.dtype) for each in reference]
        if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
            # A row that several tokens share goes through as often: their gradients in the weight come from one product so.
            every, targets = mine.pairs
            return (linear_logprobs(rows[every], weight, targets, bias=bias, **options).logps,)
        theirs = None if reference_batch is None else reference_batch.shared_rows
        found = linear_logprobs(
            rows,
            weight,
            mine.targets,
            bias=bias,
            reference_hidden=beside[0] if beside else None,
            reference_targets=None if theirs is None else theirs.targets,
            **options,
        )
        policy = mine.spread(found.logps, rows, weight, bias=bias, **options)
        if theirs is None or found.reference_logps is None:
            return (policy,)
        return policy, theirs.spread(found.reference_logps, beside[0], weight, bias=bias, **options)

    # PEFT's layer and not the module inside: adapters on the head are gathered with it.
    return through_head(head, compute, *(each for each in (rows, reference_rows) if each is not None))


def _logit_options(base: Any) -> dict[str, Any]:
    """What the model does to its head's output. A setting counts where the class reads it: LLaVA's ignores its language model's."""
    text, code = base.config.get_text_config(), inspect.unwrap(type(base).forward).__code__
    # As an attribute, or by `getattr`.
    read = {*code.co_names, *(constant for constant in code.co_consts if isinstance(constant, str))}

    def setting(name: str) -> Any:
        return getattr(text, name, None) if name in read else None

    # Cohere multiplies its logits by `logit_scale`, Granite divides them by `logits_scaling`, Muse has a multiplier of its own.
    scaling = setting("logits_scaling") or 1.0
    scale = setting("logit_scale") or (1.0 / scaling if scaling == 1.0 or family_of(base).divides_logits else scaling)
    scale *= setting("output_multiplier") or 1.0
    return {"softcap": setting("final_logit_softcapping"), "logit_scale": scale}


def _module(head: Any) -> nn.Module:
    """The module whose weight the head works with now, inside PEFT's wrappers."""
    if isinstance(head, BaseTunerLayer):
        return head.get_base_layer()  # type: ignore[no-any-return]
    if isinstance(head, ModulesToSaveWrapper):
        off = head.disable_adapters or not head.active_adapters
        return head.original_module if off else head.modules_to_save[head.active_adapters[0]]  # type: ignore[no-any-return]
    return head  # type: ignore[no-any-return]


def _adapted(head: Any, weight: Tensor) -> Tensor:
    """The weight with the head's adapters added, unless they are switched off."""
    if isinstance(head, BaseTunerLayer) and not head.disable_adapters and not head.merged:
        for adapter in head.active_adapters:
            weight = weight + head.get_delta_weight(adapter)  # type: ignore[attr-defined]
    return weight
