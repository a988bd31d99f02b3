"""`PreferenceTrainer`: preference training of vision-language models on `transformers.Trainer`, one token tree a micro-batch."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from mmdpo_kernels import PreferenceLoss, SequenceLogps, TokenLogps, patch_model, preference_loss, record_attention
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.families import family_of
from mmdpo_trainers.progress import Progress
from mmdpo_trainers.run_folder import read_json, write_atomic
from mmdpo_trainers.training import head, model_parts
from mmdpo_trainers.training.checkpoints import latest_complete, mark_complete, remove_old, start
from mmdpo_trainers.training.collator import PreferenceBatch, PreferenceCollator
from mmdpo_trainers.training.packing import batch_sampler
from mmdpo_trainers.training.preference_config import PreferenceConfig
from mmdpo_trainers.training.preference_records import record_images, record_name
from mmdpo_trainers.training.reference import Reference
from mmdpo_trainers.training.reference_cache import Precomputed, ReferenceCache, precompute, reference_header
from mmdpo_trainers.training.training_log import Averages

logger = logging.getLogger(__name__)

LOG_STATE = "log_state.json"

_PAIRWISE = "pairwise_loss"


class PreferenceTrainer(Trainer):
    """Trains a policy on chosen and rejected responses to prompts with pictures.

    Chosen and rejected responses of a whole micro-batch are packed into one token tree, so a shared prompt and its pictures are
    run once; the vision tower sees each distinct picture once, for policy and reference together. Log-probabilities come straight
    from hidden states (`linear_logprobs`). The reference is the model with its adapter switched off, or a second model.

    Args:
        model: a `LlavaForConditionalGeneration`, or a PEFT model around one. Its dropout is switched off, and it is patched
            (`mmdpo_kernels.patch_model`) unless neither tree packing nor attention logging is on.
        args: see `PreferenceConfig`.
        processing_class: the model's processor.
        train_dataset, eval_dataset: TRL's columns, see `PreferenceCollator`: a `datasets.Dataset` or a list of records.
        peft_config: in place of the LoRA adapter that `args` describes.
        ref_model: the reference; None: the adapter switched off, or for full fine-tuning a copy of the model as it comes.
        callbacks: as in `transformers.Trainer`.

    `train(resume_from_checkpoint="auto")` continues from the last whole checkpoint of `output_dir`, or starts. With the same
    number of threads a continued run ends with the same weights, bit for bit, as one that was never interrupted.

    Logged, averaged over records, micro-batches and the logging interval (evaluation: with prefix `eval_`): `loss`,
    `rewards/chosen`, `rewards/rejected`, `rewards/accuracies`, `rewards/margins` (unless `nll` is the only loss; without a
    reference they are beta times log-probabilities),
    `rewards/chosen_<kind>` and so on for records with a `kind`, `logps/chosen`, `logps/rejected`, `nll_loss` (per token, where
    that loss is used), and `attn/ratio_<format>`: the share of the attention on a record's pictures that its chosen response gives
    the asked-about one. With tree packing, pictures that several
    records of a micro-batch share count once, for the first of these records; a record whose pictures get no attention is left out.
    `eval_loss` is the loss of all records as one batch, whatever the evaluation batch size (but `kto_pair`, which looks at batch means).

    Checkpoints are told by markers in their folders: what others wrote into `output_dir` is reported, and never removed.

    Raises ValueError for settings that do not fit the model; DataError, naming the record, for one that cannot be used.
    """

    args: PreferenceConfig
    data_collator: PreferenceCollator  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module,
        args: PreferenceConfig,
        *,
        processing_class: Any,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: PeftConfig | None = None,
        ref_model: nn.Module | None = None,
        callbacks: list[TrainerCallback] | None = None,
        progress: Progress | None = None,
    ) -> None:
        _check_devices(args)
        self.args = args
        self.ref_model = model_parts.second_model(model, args, peft_config, ref_model)
        model = model_parts.make_trainable(model, args, peft_config)
        for each in (model, self.ref_model):
            if each is not None:
                head.check_head(each)
                model_parts.disable_dropout(each)
                if args.tree_packing or args.attention_layer is not None:
                    patch_model(each)
        shares_features = ref_model is None and model_parts.sees_as_reference(model)
        shares_head = ref_model is None and head.heads_alike(model)
        base = model_parts.base_of(model)
        _check_layer(args.attention_layer, base.config.get_text_config().num_hidden_layers)
        pool = train_dataset if train_dataset is not None else next(iter(_several(eval_dataset)))
        collator = _collator(base, processing_class, args, pool)
        self.progress = progress or Progress()
        self.left_out: list[str] = []
        """Names of records longer than `max_length`."""
        self._averages = {"train": Averages(), "eval": Averages()}
        self._resumed_from: Path | None = None
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=self._short_enough(train_dataset, collator),
            eval_dataset=self._short_enough(eval_dataset, collator),
            processing_class=processing_class,
            callbacks=[_RestoreLog(self), *(callbacks or [])],
        )
        # `compute_loss` divides by the whole accumulated batch itself.
        self.model_accepts_loss_kwargs = True
        if self.ref_model is not None:
            self.ref_model.to(self.args.device)
        self._known: dict[int, Any] = {}
        """Datasets whose records the reference's cache holds."""
        self.reference = Reference(
            model,
            self.ref_model,
            shares_features=shares_features,
            shares_head=shares_head,
            autocast=self.accelerator.autocast,
        )

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: list[str] | None = None
    ) -> TrainOutput:
        """As in `transformers.Trainer`; `"auto"`: from the last whole checkpoint of `output_dir` if there is one."""
        if resume_from_checkpoint in ("auto", True):
            found = latest_complete(str(self.args.output_dir), report=logger.warning)
            if found is None and resume_from_checkpoint is True:
                raise ValueError(f"resume_from_checkpoint: {self.args.output_dir} has no whole checkpoint; pass 'auto' to start")
            resume_from_checkpoint = None if found is None else str(found)
        self._resumed_from = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
        self.precompute_reference()
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    @property
    def _policy(self) -> Any:
        return self.model

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of one micro-batch, scaled so that the micro-batches of an optimizer step add up to the loss of them all at once.

        num_items_in_batch: (2,) int64, records and chosen tokens of the whole step; None: the micro-batch is all there is.
        """
        batch: PreferenceBatch = inputs["batch"].to(self.args.device)
        averages = self._averages["train" if model.training else "eval"]
        policy, reference = self._logps(batch, inputs.get("reference_batch"), training=model.training, averages=averages)
        records, tokens = (len(batch.ids), batch.chosen_tokens) if num_items_in_batch is None else num_items_in_batch.tolist()
        loss = self._loss(batch, policy, reference, records, tokens, averages)
        return (loss, {}) if return_outputs else loss

    def _logps(
        self, batch: PreferenceBatch, reference_batch: PreferenceBatch | None, *, training: bool, averages: Averages
    ) -> tuple[TokenLogps, SequenceLogps | TokenLogps | None]:
        """The policy's and, where a loss looks at it, the reference's log-probabilities.

        reference_batch: with separate draws of the corruption the reference's own, with pictures of its own.
        """
        features = self._features(batch)
        theirs = batch if reference_batch is None else reference_batch.to(self.args.device)
        shared = features if reference_batch is None else None
        rows, reference = None, None
        if self.args.needs_reference and self.reference.scored_beside_policy:
            rows = self.reference.rows(theirs, shared)
        elif self.args.needs_reference:
            reference = self.reference.logps(theirs, shared)
        with self._recorded(batch, training=training, averages=averages), self.accelerator.autocast():
            hidden = model_parts.hidden_states(self._policy, batch, features)
        # The head stays out of autocast: its log-probabilities are made in float32.
        scored = head.scored_rows(hidden, batch)
        if rows is None:
            return batch.token_logps(head.token_logps(self._policy, scored, batch)), reference
        mine, beside = head.token_logps_beside(self._policy, scored, batch, rows, theirs)
        return batch.token_logps(mine), batch.token_logps(beside)

    def _loss(
        self,
        batch: PreferenceBatch,
        policy: TokenLogps,
        reference: SequenceLogps | TokenLogps | None,
        records: int,
        tokens: int,
        averages: Averages,
    ) -> Tensor:
        args, weights, count = self.args, self.args.weight_of, len(batch.ids)
        outcomes: list[PreferenceLoss] = []
        loss = policy.logps.new_zeros(())
        pairwise = [name for name in weights if name != "nll"]
        if pairwise:
            outcome = preference_loss(
                policy,
                reference,
                loss_type=pairwise,
                loss_weights=[weights[name] for name in pairwise],
                beta=args.beta,
                label_smoothing=args.label_smoothing,
                anchor=args.anchor,
                anchors=args.anchors,
                simpo_gamma=args.simpo_gamma,
                length_normalised=args.length_normalised,
            )
            outcomes.append(outcome)
            loss = loss + outcome.loss * (count / records)
            if averages is self._averages["eval"]:
                averages.add({_PAIRWISE: outcome.loss.detach()}, count)
            averages.add({f"rewards/{name}": _mean(value) for name, value in _rewards(outcome).items()}, count)
            for kind in sorted({kind for kind in batch.kinds if kind}):
                mine = [index for index, each in enumerate(batch.kinds) if each == kind]
                averages.add({f"rewards/{name}_{kind}": _mean(value[mine]) for name, value in outcome.rewards.items()}, len(mine))
        if "nll" in weights:
            # A loss of its own, as it is averaged over tokens and not over records.
            nll = preference_loss(policy, loss_type=("nll",))
            outcomes.append(nll)
            loss = loss + weights["nll"] * nll.loss * (batch.chosen_tokens / tokens)
            averages.add({"nll_loss": nll.loss.detach()}, batch.chosen_tokens)
        averages.add({f"logps/{name}": _mean(value) for name, value in outcomes[0].logps.items()}, count)
        return loss

    def _features(self, batch: PreferenceBatch) -> list[Tensor]:
        with self.accelerator.autocast():
            return model_parts.picture_features(self._policy, batch)

    def precompute_reference(self, *datasets: Any) -> list[Precomputed]:
        """Run the reference over the records that its cache does not hold yet; nothing unless `precompute_ref_log_probs` is set.

        datasets: as `train_dataset`; none: the trainer's own. `train` and `evaluate` do this by themselves. A killed pass
        continues where it stopped. Returns what was done for each dataset not seen before. Raises StaleCacheError where the cache was
        made by another reference.
        """
        args = self.args
        results: list[Precomputed] = []
        if not (args.precompute_ref_log_probs and args.needs_reference):
            return results
        new = [
            each
            for each in datasets or (self.train_dataset, *_several(self.eval_dataset))
            if each is not None and id(each) not in self._known
        ]
        with self.reference.active() if new else contextlib.nullcontext():
            if self.reference.cache is None:
                path = Path(args.reference_cache or Path(str(args.output_dir)) / "reference.jsonl")
                self.reference.cache = ReferenceCache(path, self._reference_header())
                self.data_collator.runs_reference = False
            for dataset in new:
                done = precompute(
                    self.reference.cache,
                    self.reference.model,
                    self.data_collator,
                    dataset,
                    max_tokens=args.max_tokens_per_batch,
                    batch_size=args.per_device_eval_batch_size,
                    autocast=self.accelerator.autocast,
                    num_workers=args.dataloader_num_workers,
                    progress=self.progress,
                )
                self.progress.print(f"reference: {done}")
                self._known[id(dataset)] = dataset
                results.append(done)
        return results

    def _reference_header(self) -> dict[str, Any]:
        autocast = "bfloat16" if self.args.bf16 else "float16" if self.args.fp16 else False
        return reference_header(self.reference.model, processor=self.processing_class, autocast=autocast)

    def get_train_dataloader(self) -> DataLoader:
        """As in `transformers.Trainer`; with `max_tokens_per_batch` or `group_by_pictures` of batches made once, in a new order each epoch."""
        args, dataset = self.args, self.train_dataset
        if dataset is None or not (args.max_tokens_per_batch or args.group_by_pictures):
            return super().get_train_dataloader()
        sampler = batch_sampler(dataset, self.data_collator, args, self.progress)
        workers = args.dataloader_num_workers
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    @contextlib.contextmanager
    def _recorded(self, batch: PreferenceBatch, *, training: bool, averages: Averages) -> Iterator[None]:
        """Record attention ratios while the block runs the policy, where they are to be logged."""
        layer, every = self.args.attention_layer, self.args.log_attention_every
        wanted = not training or (every > 0 and self.state.global_step % every == 0)
        if layer is None or not wanted or not batch.ratios:
            yield
            return
        with record_attention(self._policy, batch.segments, batch.recorded_rows, layers=[layer]) as recorder:
            yield
        mass = recorder.mass[layer]
        for span in batch.ratios:
            ratio = span.ratio(mass)
            if ratio is not None:
                averages.add({f"attn/ratio_{span.format}": ratio}, 1)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, PreferenceBatch]], device: torch.device) -> Tensor | None:
        batches = [sample["batch"] for sample in batch_samples]
        return torch.tensor([sum(len(b.ids) for b in batches), sum(b.chosen_tokens for b in batches)])

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss of an evaluation batch; its other values are averaged into the metrics."""
        with torch.no_grad():
            loss = self.compute_loss(model, inputs).detach()
        return loss, None, None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As in `transformers.Trainer`."""
        given = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(given, str):  # transformers evaluates a dictionary of datasets name by name
            given = self.eval_dataset[given]  # type: ignore[index, call-overload]
        self.precompute_reference(*_several(given))
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in `transformers.Trainer`, with the training log's keys among the metrics; the loss is that of all records at once."""
        self._averages["eval"].take()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = self._averages["eval"].take()
        if means:
            # Records and chosen tokens differ from batch to batch: the two parts have averages of their own.
            means["loss"] = means.pop(_PAIRWISE, 0.0) + self.args.weight_of.get("nll", 0.0) * means.get("nll_loss", 0.0)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})  # type: ignore[union-attr]
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `transformers.Trainer`, with the averages since the last training log."""
        if "loss" in logs:
            logs.update(self._averages["train"].take())
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: the estimate of transformers knows no token trees."""
        return 0

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        start(folder)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            # Its own removal of old checkpoints would not wait for the marker, nor spare what others wrote.
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        averages = self._averages["train"].state()
        write_atomic(
            folder / LOG_STATE, {"loss": self._tr_loss.item(), "last_logged": self._globalstep_last_logged, "averages": averages}
        )
        mark_complete(folder)
        remove_old(folder.parent, limit, keep=self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As in `transformers.Trainer`; a whole model by `from_pretrained`, which knows under what names weights are saved."""
        target: Any = model if model is not None else self.model
        if isinstance(target, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            saved = type(target).from_pretrained(resume_from_checkpoint, dtype="auto", local_files_only=True)
            target.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel):
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _restore_log(self) -> None:
        """Put back what was averaged but not yet logged when the checkpoint was written."""
        if self._resumed_from is None or not (self._resumed_from / LOG_STATE).is_file():
            return
        state = read_json(self._resumed_from / LOG_STATE)
        self._tr_loss.fill_(state["loss"])
        self._globalstep_last_logged = state["last_logged"]
        self._averages["train"].load(state["averages"])

    def _short_enough(self, dataset: Any, collator: PreferenceCollator) -> Any:
        limit = self.args.max_length
        if dataset is None or limit is None:
            return dataset
        if isinstance(dataset, dict):
            return {name: self._short_enough(each, collator) for name, each in dataset.items()}
        with self.progress.task("measure records", total=len(dataset)) as task:
            kept, left_out = [], []
            for index in range(len(dataset)):
                record = dataset[index]
                length = collator.length(record)
                if length <= limit:
                    kept.append(index)
                elif self.args.too_long == "error":
                    raise DataError(
                        f"record {record_name(record)}: {length} tokens are more than max_length={limit}; raise it, shorten the record, "
                        "or leave such records out with too_long='drop'"
                    )
                else:
                    left_out.append(record_name(record))
                task.advance()
        if left_out:
            first = ", ".join(left_out[:10])
            logger.warning("%d records are longer than max_length=%d and left out: %s", len(left_out), limit, first)
            self.left_out += left_out
        return dataset.select(kept) if hasattr(dataset, "select") else Subset(dataset, kept)


class _RestoreLog(TrainerCallback):
    def __init__(self, trainer: PreferenceTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._restore_log()


class _Pictures(Sequence[Any]):
    """The pictures of a dataset's records, read from their records when they are asked for."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        counts = (len(record_images(dataset[index])) for index in range(len(dataset)))
        self.places = [(index, place) for index, count in enumerate(counts) for place in range(count)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: Any) -> Any:
        index, place = self.places[number]
        return record_images(self.dataset[index])[place]


def _several(dataset: Any) -> list[Any]:
    """A dataset, or a dictionary of them, as a list."""
    return list(dataset.values()) if isinstance(dataset, dict) else [dataset]


def _mean(values: Tensor) -> float:
    """Mean in double precision, so that what is logged does not depend on how records fall into micro-batches."""
    return sum(values.tolist()) / len(values)


def _rewards(outcome: PreferenceLoss) -> dict[str, Tensor]:
    """What is logged of the rewards; (B,) each."""
    values = {**outcome.rewards, "accuracies": outcome.accuracies, "margins": outcome.margins}
    if "corrupted" in outcome.rewards:
        margins = outcome.rewards["chosen"] - outcome.rewards["corrupted"]
        values.update({"corrupted_accuracies": (margins > 0).float(), "corrupted_margins": margins})
    return values


def _collator(base: Any, processor: Any, args: PreferenceConfig, pool: Any) -> PreferenceCollator:
    tokenizer = processor.tokenizer
    end = base.generation_config.eos_token_id
    ends = [end] if isinstance(end, int) else list(end or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    if not ends:
        raise ValueError("processing_class: neither tokenizer nor generation_config has an end token; responses could not end")
    end_id = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
    return PreferenceCollator(
        processor,
        family=family_of(base),
        image_token_id=base.config.image_token_id,
        end_id=end_id,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_id,
        tree_packing=args.tree_packing,
        branches=args.branches,
        corruption=args.picture_corruption if "corrupted" in args.branches else None,
        no_image=args.no_image,
        changed_token_weight=args.changed_token_weight,
        picture_pool=_Pictures(pool) if pool is not None and args.corruption == "other" else (),
    )


def _check_devices(args: PreferenceConfig) -> None:
    if args.world_size > 1:
        raise ValueError(f"PreferenceTrainer runs in one process, got {args.world_size}; start it without a distributed launcher")
    if args.n_gpu > 1:
        # DataParallel would split a batch that is one tree.
        args._n_gpu = 1


def _check_layer(layer: int | None, layers: int) -> None:
    if layer is not None and not 0 <= layer < layers:
        raise ValueError(f"attention_layer: expected 0 to {layers - 1} (the model has {layers} decoder layers), got {layer}")
