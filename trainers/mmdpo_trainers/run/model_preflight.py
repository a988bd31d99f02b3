"""What a model folder says before a weight is read: whether a stage would refuse the model, or settings for it, in its first batch."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from mmdpo_kernels import patch_model
from mmdpo_kernels.ops.preference_loss import NEEDS_CORRUPTED
from mmdpo_trainers.answers.attention_ratios import check_layer, check_regions
from mmdpo_trainers.answers.hidden_images import check_hiding
from mmdpo_trainers.answers.vllm_engine import check_vllm_family
from mmdpo_trainers.errors import ConfigError, MmdpoError, StageError
from mmdpo_trainers.models.chat_format import render_prompt
from mmdpo_trainers.models.families import Family, family_of, hiding_refusal, image_layers
from mmdpo_trainers.models.loading import check_folder
from mmdpo_trainers.models.processors import load_processor
from mmdpo_trainers.models.quantized import check_loadable
from mmdpo_trainers.processes import launcher, ranks
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder

if TYPE_CHECKING:
    from mmdpo_trainers.training.config import PreferenceConfig

READS_MODEL = ("generate", "score", "hallucinate", "train", "evaluate")


def check_model(contexts: Sequence[StageContext]) -> None:
    """Raise MmdpoError where one of these stages would come to refuse the model, or what is asked of it."""
    wanted = [context for context in contexts if context.stage in READS_MODEL]
    if not wanted:
        return
    folder = wanted[0].model
    config = check_folder(folder)
    check_loadable(folder, config, wanted[0].config.quantization)
    family = family_of(config)
    for context in wanted:
        if context.stage in ("generate", "evaluate") and context.options.engine == "vllm":
            check_vllm_family(family, context.stage)
    render_prompt(load_processor(folder, config.model_type), "Image1:<image>\nWhat is it?")
    measured = [context for context in wanted if _measures(context)]
    if measured:
        check_layer(image_layers(config), measured[0].config.score.layer)
        check_regions(family, measured[0].config.score.regions, _formats(contexts))
    if any(context.stage == "hallucinate" and context.options.hide for context in wanted):
        check_hiding(family, config)
    model = without_weights(family, config)
    if model is None:
        return
    try:
        patch_model(model)
    except ValueError as error:
        raise StageError(f"model {folder}: {error}") from error
    for context in wanted:
        if context.stage == "train":
            _check_training(context, family, copy.deepcopy(model), image_layers(config))


def training_settings(context: StageContext, layers: Sequence[int]) -> PreferenceConfig:
    """The train stage's settings, of this process alone: transformers makes the process group with them, and the others are not here."""
    from mmdpo_trainers.stages.train import preference_config

    alone = launcher.hidden() if ranks.is_distributed() else contextlib.nullcontext()
    with alone, tempfile.TemporaryDirectory() as folder:
        somewhere = dataclasses.replace(context, run=RunFolder(folder))
        return preference_config(somewhere, layers, evaluate=context.options.held_out > 0)


def _measures(context: StageContext) -> bool:
    """Whether the stage looks at attention ratios."""
    if context.stage == "generate":
        return context.options.engine == "transformers" and bool(context.options.record_attention)
    return context.stage == "score" or (context.stage == "evaluate" and context.method.evaluation_prompts == "augmented")


def _formats(contexts: Sequence[StageContext]) -> dict[str, str]:
    """Format that is to be made -> the setting that asks for it."""
    found: dict[str, str] = {}
    for context in contexts:
        asked: dict[str, Any] = {}
        if context.stage == "augment":
            asked = {"augment.formats": context.options.formats}
        elif context.stage == "evaluate" and context.method.evaluation_prompts == "augmented" and not context.options.input:
            asked = {"evaluate.per_format": context.options.per_format}
        for setting, shares in asked.items():
            found |= {name: setting for name, share in shares.items() if share and name not in found}
    return found


def without_weights(family: Family, config: Any) -> Any | None:
    """The model as a shape, without memory; None where its class cannot be made so, and is looked at when it is loaded."""
    try:
        with torch.device("meta"):
            return family.model_class(copy.deepcopy(config)).eval()
    except ImportError as error:
        raise StageError(f"family {family.name}: a package that it needs is missing: {error}") from error
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError):
        return None


def _check_training(context: StageContext, family: Family, model: Any, layers: Sequence[int]) -> None:
    """Whether the trainer would take the model with these settings: token trees, adapter, head, attention layer, corruption."""
    from mmdpo_trainers.stages.train import check_quantization
    from mmdpo_trainers.training import model_parts
    from mmdpo_trainers.training.head import check_head

    where = f"arms.{context.arm}.train.args" if context.arm else "train.args"
    with torch.random.fork_rng(devices=[]):
        settings = training_settings(context, layers)
        check_quantization(context, model.config, settings)
        if settings.attention_layer is not None and settings.attention_layer not in layers:
            raise ConfigError(
                f"{where}: attention_layer: expected one of {list(layers)} for this model, got {settings.attention_layer}"
            )
        masked = any(each is not None and each.kind == "mask" for each in settings.image_corruptions)
        reason = hiding_refusal(family, model.config) if masked and set(settings.loss_type) & set(NEEDS_CORRUPTED) else None
        if reason is not None:
            raise ConfigError(
                f"{where}: corruption: kind 'mask' hides image tokens, which cannot be with {family.name}: {reason}; choose another kind"
            )
        try:
            model_parts.packs_trees(model, settings)
            check_head(model_parts.make_trainable(model, settings, None))
        except MmdpoError:
            raise
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error
