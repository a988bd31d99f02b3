"""What a trainer is given as model, reference and processor: taken as it is, read by its name, or refused."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from mmdpo_kernels import patch_model
from mmdpo_trainers.data.pair_records import PAIR
from mmdpo_trainers.errors import StageError
from mmdpo_trainers.models import quantized
from mmdpo_trainers.models.families import family_of, image_layers
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import check_folder, load_model
from mmdpo_trainers.models.processors import load_processor
from mmdpo_trainers.training import adapter_checks, head, model_parts, quantized_models, router_loss
from mmdpo_trainers.training.batches.collator import PreferenceCollator, collator_of
from mmdpo_trainers.training.config import PreferenceConfig
from mmdpo_trainers.training.mlp_chunks import chunk_mlps
from mmdpo_trainers.training.sharded.sharding import check_whole
from mmdpo_trainers.training.training_mode import disable_dropout

logger = logging.getLogger(__name__)

_fully_trained: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models whose own weights a trainer of this process trains."""


def model_of(argument: str, given: Any, args: PreferenceConfig) -> Any:
    """A model given as itself, or by its name: a folder, or a repository of the Hub. ValueError for anything else, naming the argument."""
    if isinstance(given, str | Path):
        sharded = args.fsdp or args.deepspeed or args.parallelism_config
        folder = _folder(argument, str(given))
        if quantized.method_of(check_folder(folder)) is not None:
            quantized_models.check_settings(args)
        return load_model(folder, device="cpu" if sharded else args.device).model
    if isinstance(given, LoadedModel):
        raise ValueError(
            f"{argument}: expected a model, got what load_model gives; pass its `model`, and its `processor` as processing_class"
        )
    if not isinstance(given, PreTrainedModel | PeftModel):
        raise ValueError(
            f"{argument}: expected a transformers model, a PeftModel or the name of a folder, got {type(given).__name__}; load it with "
            "mmdpo_trainers.models.loading.load_model"
        )
    if model_parts.base_of(given).get_output_embeddings() is None:
        raise ValueError(
            f"{argument}: expected a model with an output head, got {type(model_parts.base_of(given)).__name__}; load it with "
            "AutoModelForImageTextToText"
        )
    if quantized.check_model(argument, given):
        quantized_models.check_settings(args)
        quantized.settle(model_parts.base_of(given))
    return given


def processor_of(given: Any, base: Any) -> Any:
    """The processor as it is given, by its name, or (None) that of the model's own folder. ValueError where it has no pictures."""
    if given is None or isinstance(given, str | Path):
        name = str(given or base.config._name_or_path or "")
        if not name:
            raise ValueError("processing_class: the model does not say which folder it is from; pass its processor")
        return load_processor(_folder("processing_class", name), base.config.model_type)
    if getattr(given, "tokenizer", None) is None or getattr(given, "image_processor", None) is None:
        raise ValueError(
            f"processing_class: expected a processor for text and pictures, got {type(given).__name__}; load it with "
            "AutoProcessor.from_pretrained, from the model's folder"
        )
    return given


def _folder(argument: str, name: str) -> Path:
    """The folder that a name means; a repository of the Hub is fetched into its cache, as transformers does."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except Exception as error:
        # No such name, no network, no right: each has a class of its own.
        reason = str(error).splitlines()[0]
        raise StageError(
            f"{argument}: {name!r} is no folder here, and the Hub does not give it ({reason}); give a folder"
        ) from error


def check_reference(reference: nn.Module, base: Any, collator: PreferenceCollator, processor: Any) -> None:
    """ValueError where a second model does not read the same token ids and pictures as the policy."""
    other, expected = model_parts.base_of(reference), (family_of(base).name, base.config.image_token_id)
    found = (family_of(other).name, getattr(other.config, "image_token_id", None))
    remedy = "pass a model that reads the same tokens and pictures, such as the one that the policy was made of"
    if found != expected:
        raise ValueError(
            f"ref_model: expected a model of family {expected[0]} with image token {expected[1]}, as the policy, got "
            f"{found[0]} with {found[1]}; {remedy}"
        )
    rows, least = (int(each.config.get_text_config().vocab_size) for each in (other, base))
    # Models of one family and several sizes pad their vocabularies differently.
    if rows != least and min(rows, least) < len(processor.tokenizer):
        raise ValueError(f"ref_model: expected a vocabulary of {least} tokens, as the policy's, got {rows}; {remedy}")
    if any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in reference.parameters()):
        return
    try:
        with torch.no_grad():
            adapter_checks.probe_logps(reference, adapter_checks.probe(collator).to(next(reference.parameters()).device))
    except (ValueError, RuntimeError, IndexError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"ref_model: it cannot take what the policy's processor makes of a picture ({reason}); {remedy}"
        ) from error


def note_full_training(model: nn.Module, args: PreferenceConfig, *, copied: bool) -> None:
    """Warn where the reference is a copy of weights that an earlier trainer has trained."""
    if not args.full_finetune:
        return
    if copied and args.needs_reference:
        check_whole(model, "full_finetune keeps a copy of the model as its reference")
        if model in _fully_trained:
            logger.warning(
                "model: an earlier trainer had it too, and its weights as they are now are the reference; load it again, or pass ref_model, to "
                "start from the model as it was"
            )
    _fully_trained.add(model)


def policy_and_reference(
    model: Any, args: PreferenceConfig, peft_config: PeftConfig | None, ref_model: Any, processor: Any
) -> tuple[nn.Module, nn.Module | None, Any]:
    """The model to train, the reference where it is a second model, and their processor, of what a trainer is given."""
    given = ref_model
    model = model_of("model", model, args)
    adapter_checks.check_plain(model)
    router_loss.check(model, args)
    base = model_parts.base_of(model)
    _check_layer("attention_layer", args.attention_layer, image_layers(base.config))
    if args.attention_target is not None:
        if family_of(base).cross_attention:
            raise ValueError(
                "attention_target: this model's pictures are cross-attended and have no tokens to look at; leave it out"
            )
        _check_layer("attention_target_layer", args.target_layer, image_layers(base.config))
    processor = processor_of(processor, base)
    plain = collator_of(base, processor, args, None, tree_packing=False, branches=PAIR)
    note_full_training(model, args, copied=given is None)
    if given is not None:
        given = model_of("ref_model", given, args)
    second = model_parts.second_model(model, args, peft_config, given)
    if given is not None:
        check_reference(given, base, plain, processor)
    return adapter_checks.policy(model, args, peft_config, plain, has_reference=second is not None), second, processor


def prepare(model: nn.Module, args: PreferenceConfig, *, packs: bool) -> None:
    """Make policy or reference ready for batches: without dropout, patched where it needs to be, MLPs in chunks.

    packs: whether batches are token trees.
    """
    head.check_head(model)
    disable_dropout(model)
    if packs or args.attention_layer is not None or args.attention_target is not None:
        patch_model(model)
    chunk_mlps(model, args)
    if args.torch_compile:
        model_parts.compile_decoder(model, args)


def _check_layer(name: str, layer: int | None, layers: Sequence[int]) -> None:
    if layer is not None and layer not in layers:
        count = f"0 to {len(layers) - 1} (the model has {len(layers)} decoder layers)"
        expected = count if isinstance(layers, range) else f"one of {list(layers)}, which see pictures"
        raise ValueError(f"{name}: expected {expected}, got {layer}")
