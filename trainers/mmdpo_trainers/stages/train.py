"""train: preference training on the selected pairs, with replay; continues from the last whole checkpoint."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Subset
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmdpo_trainers.answers.attention_ratios import resolve_layer
from mmdpo_trainers.answers.layer_choice import chosen_layers
from mmdpo_trainers.answers.raters import Surroundings
from mmdpo_trainers.data.dataset_checks import equal_answers, equal_answers_line
from mmdpo_trainers.data.layouts import LayoutReader
from mmdpo_trainers.data.left_out import check_left_out, counted, lost
from mmdpo_trainers.data.pairs import read_pairs, replay_pairs, split
from mmdpo_trainers.errors import ConfigError, MmdpoError, StageError
from mmdpo_trainers.files.atomic import free_mib
from mmdpo_trainers.files.json_lines import is_stage_file, read_jsonl
from mmdpo_trainers.methods import online_settings, preset_args
from mmdpo_trainers.methods.selection import match_of
from mmdpo_trainers.models.families import image_layers
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import check_folder, load_model
from mmdpo_trainers.models.quantized import check_loadable
from mmdpo_trainers.models.whole_weights import without_bars
from mmdpo_trainers.processes import ranks
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.training import quantized_models
from mmdpo_trainers.training.checkpoints import replace_folder, writing
from mmdpo_trainers.training.config import PreferenceConfig
from mmdpo_trainers.training.online.kept import ONLINE, online_summary
from mmdpo_trainers.training.online.pairs import OnlinePairs
from mmdpo_trainers.training.reward.rater import rater_of
from mmdpo_trainers.training.trainer import PreferenceTrainer
from mmdpo_trainers.training.trainers import TRAINERS
from mmdpo_trainers.training.training_log import LogFile, TrainingProgress

_REFUSED = {
    "load_best_model_at_end": "not available in a run, whose last weights are final/",
    "hub_token": "it would be kept in the run's files; the token is taken from `hf auth login` or HF_TOKEN",
    "hub_always_push": "nothing is uploaded before the end of a run",
    "output_dir": "a run writes into its own folder; choose that one with run_dir",
    "resume_from_checkpoint": "a run continues from its last whole checkpoint by itself",
}


def inputs(context: StageContext) -> list[Path]:
    """The pairs, the single-image prompts where there is to be replay, and what rates answers where some are sampled."""
    rating = context.config.rate
    raters = (
        [rating.template, rating.judge if rating.source != "exact" else None] if online_settings(context.config).alpha else []
    )
    replayed = [replay_source(context)] if context.options.replay else []
    return [context.pairs, *replayed, *(Path(path) for path in raters if path)]


def replay_source(context: StageContext) -> Path:
    """Where replayed records come from."""
    return Path(context.options.replay_source or context.folder_of("augment") / "singles.jsonl")


def reference_cache(context: StageContext) -> Path:
    """Where the reference's log-probabilities are kept: beside the pairs, so that arms on the same pairs share them.

    Autocast makes other numbers, and has a file of its own, as each model has beside pairs that are not of a run. Where nothing can be
    written beside the pairs, it is the stage's folder.
    """
    args = preset_args(context.config)
    kind = next((f".{name}" for name in ("bf16", "fp16") if args.get(name)), "")
    is_of_run = context.pairs.absolute().is_relative_to(context.run.path.absolute())
    model = "" if is_of_run else f".{Path(context.config.model).name}"
    name = f"{context.pairs.stem}{model}{kind}.reference.jsonl"
    beside = context.pairs.parent
    return beside / name if os.access(beside, os.W_OK) or not beside.exists() else context.folder / name


def run(context: StageContext) -> dict[str, Any]:
    """Train; writes `checkpoint-*`, `log.jsonl` and `final/` (an adapter, or the whole model, with the processor)."""
    log = context.folder / "log.jsonl"
    with without_bars():
        with TrainingProgress(context.progress) as bar, contextlib.ExitStack() as rater:
            trainer, counts = make_trainer(context, [*([LogFile(log)] if ranks.is_rank_0() else []), bar, _LogLastStep()])
            if trainer.online is not None:
                rater.callback(trainer.online.rater.close)
            _check_disk(context, trainer)
            trainer.train(resume_from_checkpoint="auto")
        _save(trainer, context.folder)
    if context.options.args.get("push_to_hub"):
        context.progress.print(
            "train: uploaded at the end of `mmdpo run`; after single stages `mmdpo export --push-to-hub` does it"
        )
    lacking, told = counts.pop("lacking"), {name: counts.pop(name) for name in ("layout", "equal_answers")}
    left = {**lacking, "too_long": len(trainer.left_out)}
    total = sum(counts.values()) + sum(left.values())
    sampled = {"online": online_summary(context.folder / ONLINE)} if trainer.online is not None else {}
    return {
        **{name: value for name, value in told.items() if value},
        **counts,
        **_summary(trainer, log),
        **sampled,
        **lost(total, left),
    }


def make_trainer(context: StageContext, callbacks: list[TrainerCallback]) -> tuple[PreferenceTrainer, dict[str, Any]]:
    """This stage's trainer; how many records of each kind it trains on and holds out, their layout, and what was left out."""
    train_data, eval_data, counts = _data(context)
    online = _online(context)
    config = check_folder(context.model)
    settings = preference_config(context, image_layers(config), evaluate=eval_data is not None)
    check_quantization(context, config, settings)
    loaded = _load(context)
    second = context.options.reference == "model" and settings.needs_reference
    try:
        trainer = TRAINERS[context.method.trainer](
            loaded.model,
            settings,
            processing_class=loaded.processor,
            train_dataset=train_data,
            eval_dataset=eval_data,
            ref_model=_load(context).model if second else None,
            callbacks=callbacks,
            progress=context.progress,
            online=online,
        )
    except MmdpoError:
        raise
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"train: {_one_line(error)}") from error
    trainer.remove_callback(PrinterCallback)
    data: Any = trainer.train_dataset
    if len(data) == 0:
        raise StageError(f"every record of {context.pairs} is longer than max_length={settings.max_length}; raise it")
    read = len(train_data) + (0 if eval_data is None else len(eval_data))
    check_left_out(
        len(trainer.left_out) / read,
        context.config.allow_missing,
        f"train: {len(trainer.left_out):,} of {counted(read, 'record')} are longer than train.args.max_length={settings.max_length}; raise it",
    )
    if data is not train_data and isinstance(data, Subset):
        # Some records were longer than max_length.
        pairs = sum(index < counts["pairs"] for index in data.indices)
        counts.update(pairs=pairs, replay=len(data) - pairs)
    if eval_data is not None:
        counts["held_out"] = len(trainer.eval_dataset)  # type: ignore[arg-type]
    return trainer, counts


def _online(context: StageContext) -> OnlinePairs | None:
    """What samples in training; None: nothing does."""
    options, config = online_settings(context.config), context.config
    if not options.alpha:
        return None
    surroundings = Surroundings(
        folder=context.folder,
        device=context.device,
        dtype=config.dtype,
        date=context.date,
        allow_missing=config.allow_missing,
    )
    try:
        return OnlinePairs(options, rater_of(config.rate, surroundings))
    except ValueError as error:
        raise ConfigError(f"train: {_one_line(error)}") from error


def preference_config(context: StageContext, layers: Sequence[int], *, evaluate: bool) -> PreferenceConfig:
    """`train.args` over `train.preset` over this stage's defaults: effective batch 8, one epoch, reference cached beside the pairs."""
    args = preset_args(context.config)
    on_cpu = torch.device(_device(context)).type == "cpu"
    size = _batch_size(args) * ranks.world_size()
    layer = context.config.score.layer
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        # A token budget holds records by the dozen.
        "gradient_accumulation_steps": 1 if args.get("max_tokens_per_batch") else max(1, 8 // size),
        "num_train_epochs": 1,
        "save_strategy": "steps",
        "save_steps": 0.1,
        "eval_strategy": "steps" if evaluate else "no",
        "eval_steps": 0.1,
        "attention_layer": resolve_layer(layers, layer, chosen_layers(context.run.path, layer)),
        "seed": context.seed,
        "disable_tqdm": True,
        "log_level": "error",
        "use_cpu": on_cpu,
        # What is sampled in training no cache holds.
        "precompute_ref_log_probs": not online_settings(context.config).alpha,
        "reference_cache": str(reference_cache(context)),
        "template_date": str(context.date),
        "chat_template_kwargs": context.config.chat_template_kwargs or None,
    }
    if "loss_type" in context.options.args and "loss_weights" not in context.options.args:
        # The preset's weights belong to the preset's losses.
        args.pop("loss_weights", None)
    values = {**defaults, **args, "output_dir": str(context.folder)}
    # On a GPU the next batch is prepared while the step runs; on a CPU all cores compute.
    workers = values.setdefault("dataloader_num_workers", int(not on_cpu))
    values.setdefault("dataloader_persistent_workers", bool(workers))
    for name, reason in _REFUSED.items():
        if args.get(name):
            raise ConfigError(f"train.args.{name}: {reason}; leave it out")
    try:
        settings = TRAINERS[context.method.trainer].config_class(**values)
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"train.args: {_one_line(error)}") from error
    # The end of a run uploads what was trained, with its card (`run.upload`); the trainer would upload this folder, bit by bit.
    settings.push_to_hub = False
    return settings


def check_quantization(context: StageContext, config: Any, settings: PreferenceConfig) -> None:
    """ConfigError for settings that a model in 4 bits cannot be trained with. config: of the model's folder."""
    if check_loadable(context.model, config, context.config.quantization):
        try:
            quantized_models.check_settings(settings)
        except ValueError as error:
            raise ConfigError(f"train.args.{_one_line(error)}") from error


def _batch_size(args: dict[str, Any]) -> int:
    """Records of a micro-batch; whether it is a number is for PreferenceConfig to say."""
    size = args.get("per_device_train_batch_size", 1)
    return size if isinstance(size, int) and size > 0 else 1


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _LogLastStep(TrainerCallback):
    """Logs after the last step too, so that a run of fewer steps than `logging_steps` has a loss to report."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


def _device(context: StageContext) -> str:
    """Where this process trains."""
    device = context.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda", "cuda:0") and not ranks.is_distributed():
        raise StageError(f"device: training runs on cpu or cuda, got {device}; choose a GPU with CUDA_VISIBLE_DEVICES")
    return device


def _load(context: StageContext) -> LoadedModel:
    """The model, on the device it is trained on; for weights in shards on the CPU, from where each process takes its own."""
    args = context.options.args
    launched = any(os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true" for name in ("DEEPSPEED", "FSDP"))
    sharded = launched or args.get("deepspeed") or args.get("fsdp")
    device = "cpu" if sharded else _device(context)
    return load_model(context.model, dtype=context.config.dtype, device=device, quantization=context.config.quantization)


def _data(context: StageContext) -> tuple[Any, Any, dict[str, Any]]:
    """Data to train on, data held out (None: none), and how many records of each kind."""
    options = context.options
    if options.replay < 0:
        raise ConfigError(f"train.replay: expected a share of 0 or more, got {options.replay}")
    missing: list[str] | None = [] if context.config.allow_missing else None
    prompts = online_settings(context.config).alpha == 1
    layouts = LayoutReader(options.columns if options.input else None, pairs=not prompts)
    pairs = read_pairs(context.pairs, missing, views=context.further_views, prompts=prompts, layouts=layouts)
    if layouts.layout:
        context.progress.print(f"train: layout: {layouts.layout}; {counted(len(pairs), 'pair')}")
    if len(pairs) == 0:
        remedy = (
            "loosen the rules of select, or give your own with --input" if is_stage_file(context.pairs) else "give it records"
        )
        raise StageError(f"{context.pairs} holds no pairs; {remedy}")
    losses = preset_args(context.config).get("loss_type", "sigmoid")
    equal = equal_answers(pairs, [losses] if isinstance(losses, str) else losses)
    if equal:
        context.progress.print(f"train: warning: {equal_answers_line(equal, len(pairs))}")
    kept, held_out = split(len(pairs), options.held_out, context.seed)
    replay = replay_pairs(
        replay_source(context), round(options.replay * len(kept)), context.seed, match_of(context.config.select)
    )
    trained: Any = Subset(pairs, kept)
    replayed: Any = replay
    counts = {"pairs": len(kept), "replay": len(replay), "held_out": len(held_out)}
    lacking = {"missing": len(missing or ()), **layouts.left_out}
    found = {"equal_answers": len(equal), "layout": layouts.layout, "lacking": lacking}
    return (
        ConcatDataset([trained, replayed]) if replay else trained,
        Subset(pairs, held_out) if held_out else None,
        {**counts, **found},
    )


def _check_disk(context: StageContext, trainer: PreferenceTrainer) -> None:
    """Warn where the disk is too small for the checkpoints: trained weights and two moments of each, one more while one is written."""
    model: Any = trainer.model
    trained = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters() if p.requires_grad)
    kept = 0 if trainer.args.save_strategy == "no" else (trainer.args.save_total_limit or 10) + 1
    needed, free = (3 * kept + 2) * trained // 2**20, free_mib(context.folder)
    if needed > free:
        context.progress.print(
            f"train: warning: checkpoints and the trained weights need about {needed:,} MiB, and {free:,} MiB are free in {context.folder}; "
            "make room, or lower train.args.save_total_limit"
        )


def _save(trainer: PreferenceTrainer, folder: Path) -> None:
    temporary = folder / ".final.tmp"
    if ranks.is_rank_0():
        shutil.rmtree(temporary, ignore_errors=True)
    ranks.barrier()
    with writing(temporary):
        trainer.save_model(str(temporary))
    ranks.barrier()
    if ranks.is_rank_0():
        replace_folder(temporary, folder / "final")
    ranks.barrier()


def _summary(trainer: PreferenceTrainer, log: Path) -> dict[str, Any]:
    model: Any = trainer.model
    entries = [entry for entry in read_jsonl(log) if "loss" in entry]
    evaluations = [entry for entry in read_jsonl(log) if "eval_loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "left_out": len(trainer.left_out),
        # ZeRO-3 keeps the size of a weight elsewhere.
        "trained_parameters": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad),
        "loss_type": trainer.args.loss_type,
        "attention_layer": trainer.args.attention_layer,
        "final_loss": entries[-1]["loss"] if entries else None,
        "first": entries[0] if entries else None,
        # Not the same object, which YAML would print as a reference to it.
        "last": dict(entries[-1]) if entries else None,
        "last_evaluation": evaluations[-1] if evaluations else None,
    }
