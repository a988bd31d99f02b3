"""`PreferenceTrainer`: preference training of vision-language models on `transformers.Trainer`, one token tree a micro-batch."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from mmdpo_kernels import PreferenceLoss, SequenceLogps, TokenLogps, patch_model, preference_loss, record_attention
from mmdpo_trainers.data.pair_records import PAIR
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.models.families import EncodedPictures, family_of, picture_layers
from mmdpo_trainers.processes import collectives
from mmdpo_trainers.processes.progress import Progress
from mmdpo_trainers.training import adapter_checks, arguments, given_models, head, model_parts
from mmdpo_trainers.training.batches.collator import PreferenceBatch, PreferenceCollator, collator_of
from mmdpo_trainers.training.batches.packing import batch_sampler, check_datasets, is_streaming, short_enough
from mmdpo_trainers.training.checkpoints import LOG_STATE, SavingTrainer, latest_complete, newest
from mmdpo_trainers.training.config import PreferenceConfig
from mmdpo_trainers.training.reference.cache import ReferenceCache
from mmdpo_trainers.training.reference.model_hash import reference_header
from mmdpo_trainers.training.reference.precompute import Precomputed, precompute
from mmdpo_trainers.training.reference.reference import Reference
from mmdpo_trainers.training.sharded.batches import COUNTS, batches_of, sharded_loader
from mmdpo_trainers.training.sharded.sharding import Sharding, check_whole, through_root
from mmdpo_trainers.training.stopping import GradientCheck, LossCheck, connected
from mmdpo_trainers.training.training_log import Averages
from mmdpo_trainers.training.training_mode import disable_dropout, offload_checkpoints, quiet

logger = logging.getLogger(__name__)

_PAIRWISE = "pairwise_loss"


class PreferenceTrainer(SavingTrainer):
    """Trains a policy on chosen and rejected responses to prompts with pictures.

    Chosen and rejected responses of a whole micro-batch are packed into one token tree, so a shared prompt and its pictures are
    run once (where trees are not exact with a model, `mmdpo_kernels.tree_refusal` says why, and they run as padded rows); the vision
    tower sees each distinct picture once, for policy and reference together. Log-probabilities come straight
    from hidden states (`linear_logprobs`). The reference is the model with its adapter switched off, or a second model.

    Args:
        model: a transformers model of a family in `families.FAMILIES` or one that follows the conventions, or a PEFT model around one; or
            its name, a folder or a repository of the Hub. Its dropout is switched off, and it is patched (`mmdpo_kernels.patch_model`)
            unless neither tree packing nor attention logging is on.
        args: see `PreferenceConfig`.
        processing_class: the model's processor, or a name; None: that of the model's own folder.
        train_dataset, eval_dataset: TRL's columns, see `PreferenceCollator`: a `datasets.Dataset` or a list of records; with `max_steps` also
            a `datasets.IterableDataset`, in one process. A dictionary of several to evaluate on.
        peft_config: in place of the LoRA adapter that `args` describes.
        ref_model: the reference, or its name; None: the adapter switched off, or for full fine-tuning a copy of the model as it comes.
        callbacks: as in `transformers.Trainer`.
        others: TRL's arguments that are not here: an error says what is in their place.

    `train(resume_from_checkpoint="auto")` continues from the last whole checkpoint of `output_dir`, or starts. With the same
    number of threads a continued run ends with the same weights, bit for bit, as one that was never interrupted.

    Started in several processes (DDP, DeepSpeed ZeRO-2 and ZeRO-3, FSDP2: docs/scaling.md) it ends as in one that has all their records.

    Logged, averaged over records, micro-batches and the logging interval (evaluation: with prefix `eval_`): `loss`,
    `rewards/chosen`, `rewards/rejected`, `rewards/accuracies`, `rewards/margins` (unless `nll` is the only loss; without a
    reference they are beta times log-probabilities),
    `rewards/<branch>`, `rewards/<branch>_accuracies` and `rewards/<branch>_margins` (of chosen over it) for other branches,
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
        model: nn.Module | str,
        args: PreferenceConfig,
        *,
        processing_class: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: PeftConfig | None = None,
        ref_model: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        progress: Progress | None = None,
        **others: Any,
    ) -> None:
        arguments.check_trainer_arguments(args, others, PreferenceConfig)
        check_datasets(train_dataset, eval_dataset, args)
        if args.n_gpu > 1:
            # DataParallel would split a batch that is one tree.
            args._n_gpu = 1
        if args.world_size > 1 and args.train_sampling_strategy == "batch_rebalance":
            raise ValueError("train_sampling_strategy: batch_rebalance deals records out by itself; use max_tokens_per_batch")
        if any(map(is_streaming, (train_dataset, *_several(eval_dataset)))):
            # accelerate would put records of several batches together.
            args.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]
        self.args = args
        policy, processing_class = self._policy_and_reference(model, processing_class, peft_config, ref_model)
        packs = model_parts.packs_trees(policy, args)
        for each in (policy, self.ref_model):
            if each is not None:
                head.check_head(each)
                disable_dropout(each)
                if packs or args.attention_layer is not None:
                    patch_model(each)
                if args.torch_compile:
                    model_parts.compile_decoder(each, args)
        shares_features = ref_model is None and model_parts.sees_as_reference(policy)
        shares_head = ref_model is None and head.heads_alike(policy)
        base = model_parts.base_of(policy)
        pool = train_dataset if train_dataset is not None else next(iter(_several(eval_dataset)))
        collator = collator_of(base, processing_class, args, pool, tree_packing=packs)
        self.progress = progress or Progress()
        self.left_out: list[str] = []
        """Names of records longer than `max_length`."""
        text = base.config.get_text_config()
        # Weights that a step without pictures leaves without a gradient, or one whose tokens take other experts.
        self._uneven = family_of(base).cross_attention or any(
            parameter.requires_grad for parameter in model_parts.picture_parameters(policy)
        )
        if args.ddp_find_unused_parameters is None:
            experts = any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
            args.ddp_find_unused_parameters = self._uneven or experts
        self._averages = {"train": Averages(), "eval": Averages()}
        self._resumed_from: Path | None = None
        super().__init__(
            model=policy,
            args=args,
            data_collator=collator,
            train_dataset=short_enough(train_dataset, collator, args, self.progress, self.left_out),
            eval_dataset=short_enough(eval_dataset, collator, args, self.progress, self.left_out),
            processing_class=processing_class,
            callbacks=[_RestoreLog(self), GradientCheck(self), *(callbacks or [])],
        )
        # `compute_loss` divides by the whole accumulated batch itself.
        self.model_accepts_loss_kwargs = True
        self.sharding = Sharding(self)
        self._known: dict[int, Any] = {}
        """Datasets whose records the reference's cache holds."""
        self._header: dict[str, Any] | None = None
        caches = args.precompute_ref_log_probs and args.needs_reference
        if caches and self.ref_model is not None and self.sharding.in_shards:
            # A hash of the weights needs them whole.
            self._header = self._reference_header(self.ref_model)
        self.reference = Reference(
            policy,
            self.ref_model,
            shares_features=shares_features,
            shares_head=shares_head,
            autocast=self.accelerator.autocast,
            wrapped=None if self.ref_model is None else self.sharding.frozen(self.ref_model),
        )
        self._loss_check = LossCheck()
        # What other processes' batches make a process run, although its own has no picture.
        self._blank = model_parts.blank_picture(family_of(base), processing_class) if args.world_size > 1 else None

    def _policy_and_reference(
        self, model: Any, processor: Any, peft_config: PeftConfig | None, ref_model: Any
    ) -> tuple[nn.Module, Any]:
        """The model to train and its processor, of what the trainer was given; sets `ref_model`."""
        args, given = self.args, ref_model
        model = given_models.model_of("model", model, args)
        adapter_checks.check_plain(model)
        base = model_parts.base_of(model)
        _check_layer(args.attention_layer, picture_layers(base.config))
        processor = given_models.processor_of(processor, base)
        plain = collator_of(base, processor, args, None, tree_packing=False, branches=PAIR)
        given_models.note_full_training(model, args, copied=given is None)
        if given is not None:
            given = given_models.model_of("ref_model", given, args)
        self.ref_model = model_parts.second_model(model, args, peft_config, given)
        if given is not None:
            given_models.check_reference(given, base, plain, processor)
        return adapter_checks.policy(model, args, peft_config, plain, has_reference=self.ref_model is not None), processor

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: list[str] | None = None
    ) -> TrainOutput:
        """As in `transformers.Trainer`; `"auto"`: from the last whole checkpoint of `output_dir` if there is one."""
        if resume_from_checkpoint in ("auto", True):
            found = self._latest_checkpoint()
            if found is None and resume_from_checkpoint is True:
                raise ValueError(f"resume_from_checkpoint: {self.args.output_dir} has no whole checkpoint; pass 'auto' to start")
            resume_from_checkpoint = found
        if self.train_dataset is not None and not is_streaming(self.train_dataset) and not len(self.train_dataset):  # type: ignore[arg-type]
            long = f"; {len(self.left_out)} are longer than max_length={self.args.max_length}, raise it" if self.left_out else ""
            raise DataError(f"train_dataset: expected records, got none{long}")
        self._resumed_from = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
        if not self._reference_waits:
            self.precompute_reference()
        elif self.args.precompute_ref_log_probs and self.args.needs_reference and self._header is None:
            self._header = self._reference_header(self.reference.model)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _latest_checkpoint(self) -> str | None:
        """The last whole checkpoint. Looked for by one process, as what is half is removed."""
        folder = str(self.args.output_dir)
        found = latest_complete(folder, report=logger.warning) if self.args.process_index == 0 else None
        return collectives.gathered(None if found is None else str(found))[0]

    @property
    def _reference_waits(self) -> bool:
        """Whether the reference's pass comes when training has put the policy's weights in shards, and not before."""
        return self.sharding.in_shards and self.ref_model is None

    @property
    def _policy(self) -> Any:
        return self.model

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of one micro-batch, scaled so that the micro-batches of an optimizer step add up to the loss of them all at once.

        num_items_in_batch: (2,) int64, records and chosen tokens of the whole step; None: the micro-batch is all there is.
        """
        if model.training:
            quiet(self._policy)
        batch: PreferenceBatch = inputs["batch"].to(self.args.device)
        counts = inputs.get(COUNTS, True)
        averages = self._averages["train" if model.training else "eval"] if counts else Averages()
        policy, reference = self._logps(batch, inputs.get("reference_batch"), training=model.training, averages=averages)
        records, tokens = (len(batch.ids), batch.chosen_tokens) if num_items_in_batch is None else num_items_in_batch.tolist()
        loss, parts = self._loss(batch, policy, reference, records, tokens, averages)
        if model.training and self.args.stop_on_nonfinite_loss:
            self._loss_check.look(loss, batch.ids, parts)
            if self.accelerator.sync_gradients:
                self._loss_check.stop(self.state.global_step + 1, self.args.device, self._kept)
        if model.training and not self.sharding.in_shards:
            loss = connected(loss, self._policy)
        if not counts:
            loss = loss * 0
        if model.training and collectives.several():
            # The mean over processes that gradients and logs are is to be a sum.
            loss = loss * self.args.world_size
        return (loss, {}) if return_outputs else loss

    def _kept(self) -> str:
        """What a message says of the checkpoints so far."""
        folder = str(self.args.output_dir)
        found = collectives.gathered(newest(folder) if self.args.process_index == 0 else None)[0]
        return "there is no checkpoint yet" if found is None else f"{found} is whole, and training continues from it"

    def _logps(
        self, batch: PreferenceBatch, reference_batch: PreferenceBatch | None, *, training: bool, averages: Averages
    ) -> tuple[TokenLogps, SequenceLogps | TokenLogps | None]:
        """The policy's and, where a loss looks at it, the reference's log-probabilities, in one call of the outermost module.

        reference_batch: with separate draws of the corruption the reference's own, with pictures of its own.
        """
        args, reference = self.args, self.reference
        theirs = batch if reference_batch is None else reference_batch.to(args.device)
        cached = reference.cached(theirs) if args.needs_reference else None
        runs = args.needs_reference and cached is None
        blank = self._blank_for(batch)

        def forward() -> tuple[Tensor, ...]:
            features, nothing = self._features(batch), None
            if blank is not None:
                with self.accelerator.autocast():
                    features, nothing = model_parts.features_of_blank(self._policy, batch, blank)
            shared = features if reference_batch is None else None
            beside = runs and reference.scored_beside_policy
            rows = reference.rows(theirs, shared, blank) if beside else None
            others = (reference.token_logps(theirs, shared, blank),) if runs and not beside else ()
            with self._recorded(batch, training=training, averages=averages), self.accelerator.autocast():
                hidden = model_parts.hidden_states(self._policy, batch, features)
            # The head stays out of autocast: its log-probabilities are made in float32.
            scored = head.scored_rows(hidden, batch)
            if rows is None:
                mine = head.token_logps(self._policy, scored, batch)
            else:
                mine, *others = head.token_logps_beside(self._policy, scored, batch, rows, theirs)  # type: ignore[assignment]
            return mine if nothing is None else mine + nothing.to(mine), *others

        wrapped = self.model_wrapped if torch.is_grad_enabled() or self.sharding.in_shards else self.model
        mine, *others = through_root(wrapped, self.sharding.inside(wrapped), forward)  # type: ignore[arg-type]
        return batch.token_logps(mine), batch.token_logps(others[0]) if runs else cached

    def _blank_for(self, batch: PreferenceBatch) -> EncodedPictures | None:
        """The blank picture, where this process has to run one beside others that have pictures."""
        matters = self.sharding.in_shards or (self._uneven and torch.is_grad_enabled())
        if not (matters and collectives.several()):
            return None
        somewhere = collectives.anywhere(batch.pictures is not None, self.args.device)
        return self._blank if somewhere and batch.pictures is None else None

    def _loss(
        self,
        batch: PreferenceBatch,
        policy: TokenLogps,
        reference: SequenceLogps | TokenLogps | None,
        records: int,
        tokens: int,
        averages: Averages,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and what it is made of by name."""
        args, weights, count = self.args, self.args.weight_of, len(batch.ids)
        parts: dict[str, Tensor] = {}
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
            parts |= {name: outcome.losses[name].detach() for name in pairwise}
            averages.add({f"rewards/{name}": _mean(value) for name, value in _rewards(outcome).items()}, count)
            for kind in sorted({kind for kind in batch.kinds if kind}):
                mine = [index for index, each in enumerate(batch.kinds) if each == kind]
                averages.add({f"rewards/{name}_{kind}": _mean(value[mine]) for name, value in outcome.rewards.items()}, len(mine))
        if "nll" in weights:
            # A loss of its own, as it is averaged over tokens and not over records.
            nll = preference_loss(policy, loss_type=("nll",))
            outcomes.append(nll)
            loss = loss + weights["nll"] * nll.loss * (batch.chosen_tokens / tokens)
            parts["nll"] = nll.loss.detach()
            averages.add({"nll_loss": parts["nll"]}, batch.chosen_tokens)
        averages.add({f"logps/{name}": _mean(value) for name, value in outcomes[0].logps.items()}, count)
        return loss, parts | {f"logps/{name}": value.detach() for name, value in outcomes[0].logps.items()}

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
                header = self._header or self._reference_header(self.reference.model)
                self.reference.cache = ReferenceCache(args.reference_path, header)
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
                    logps=self._reference_logps,
                    in_step=self.sharding.in_shards,
                )
                self.progress.print(f"reference: {done}")
                self._known[id(dataset)] = dataset
                results.append(done)
        return results

    def _reference_logps(self, batch: PreferenceBatch) -> Tensor:
        """(n, b) log-probabilities of a batch of the reference's pass; the adapter is off."""
        batch, blank = batch.to(self.args.device), self._blank_for(batch)
        if self.ref_model is not None or not self.sharding.in_shards:
            return self.reference.response_logps(batch, blank)
        wrapped = self.model_wrapped
        return through_root(wrapped, self.sharding.inside(wrapped), lambda: self.reference.response_logps(batch, blank))

    def _reference_header(self, model: nn.Module) -> dict[str, Any]:
        check_whole(model, "precompute_ref_log_probs names the reference by its weights")
        autocast = "bfloat16" if self.args.bf16 else "float16" if self.args.fp16 else False
        return reference_header(model, processor=self.processing_class, autocast=autocast)

    def get_train_dataloader(self) -> DataLoader:
        """As in `transformers.Trainer`; with `max_tokens_per_batch` or `group_by_pictures` of batches made once, in a new order each epoch."""
        args, dataset = self.args, self.train_dataset
        packed = args.max_tokens_per_batch or args.group_by_pictures
        if dataset is None or not (packed or args.world_size > 1):
            return super().get_train_dataloader()
        if packed:
            sampler: Any = batch_sampler(dataset, self.data_collator, args, self.progress)
        else:
            records, size = self._get_train_sampler(), self._train_batch_size
            sampler = batches_of(records, size, drop_last=args.dataloader_drop_last, data_seed=args.data_seed)
        if args.world_size > 1:
            return sharded_loader(dataset, sampler, self.data_collator, args, lasting=True)
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

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As in `transformers.Trainer`, with every record; several processes have one process's batches between them."""
        if self.args.world_size <= 1:
            dropped, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
            try:
                return super().get_eval_dataloader(eval_dataset)
            finally:
                self.args.dataloader_drop_last = dropped
        named = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset  # type: ignore[index,call-overload]
        dataset: Any = self.eval_dataset if named is None else named
        batches = batches_of(range(len(dataset)), self.args.per_device_eval_batch_size)
        return sharded_loader(dataset, batches, self.data_collator, self.args)

    @contextlib.contextmanager
    def _recorded(self, batch: PreferenceBatch, *, training: bool, averages: Averages) -> Iterator[None]:
        """Record attention ratios while the block runs the policy, where they are to be logged."""
        layer, every = self.args.attention_layer, self.args.log_attention_every
        wanted = not training or (every > 0 and self.state.global_step % every == 0)
        if layer is None or not wanted or not batch.ratios:
            yield
            return
        with record_attention(
            self._policy, batch.segments, batch.recorded_rows, layers=[layer], cross_segments=batch.cross_segments
        ) as recorder:
            yield
        mass = recorder.mass[layer]
        for span in batch.ratios:
            ratio = span.ratio(mass)
            if ratio is not None:
                averages.add({f"attn/ratio_{span.format}": ratio}, 1)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, PreferenceBatch]], device: torch.device) -> Tensor | None:
        batches = [sample["batch"] for sample in batch_samples if sample.get(COUNTS, True)]
        mine = sum(len(batch.ids) for batch in batches), sum(batch.chosen_tokens for batch in batches)
        return torch.tensor(collectives.summed(mine, device))

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
        check_datasets(None, given, self.args)
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
        self._averages["eval"].clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = self._averages["eval"].take()
        if means:
            # Records and chosen tokens differ from batch to batch: the two parts have averages of their own.
            means["loss"] = means.pop(_PAIRWISE, 0.0) + self.args.weight_of.get("nll", 0.0) * means.get("nll_loss", 0.0)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})  # type: ignore[union-attr]
        return output

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # The loss since the last log line is the mean over processes, as it is in the log.
        losses = collectives.gathered(self._tr_loss.item())
        self._tr_loss.fill_(sum(losses) / len(losses))
        return super()._finalize_training(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `transformers.Trainer`, with the averages since the last training log."""
        if "loss" in logs:
            logs.update(self._averages["train"].take())
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: the estimate of transformers knows no token trees."""
        return 0

    def _restore_log(self) -> None:
        """Put back what was averaged but not yet logged when the checkpoint was written."""
        if self._resumed_from is None or not (self._resumed_from / LOG_STATE).is_file():
            return
        state = read_json(self._resumed_from / LOG_STATE)
        self._tr_loss.fill_(state["loss"])
        self._globalstep_last_logged = state["last_logged"]
        # All processes' values are in it: one of them goes on with them.
        self._averages["train"].load(state["averages"] if self.args.process_index == 0 else {})


class _RestoreLog(TrainerCallback):
    def __init__(self, trainer: PreferenceTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._restore_log()
        if self.trainer._reference_waits:
            self.trainer.precompute_reference()
        if self.trainer.args.activation_offloading:
            offload_checkpoints(self.trainer._policy)


def _several(dataset: Any) -> list[Any]:
    """A dataset, or a dictionary of them, as a list."""
    return list(dataset.values()) if isinstance(dataset, dict) else [dataset]


def _mean(values: Tensor) -> float:
    """Mean in double precision, so that what is logged does not depend on how records fall into micro-batches."""
    return sum(values.tolist()) / len(values)


def _rewards(outcome: PreferenceLoss) -> dict[str, Tensor]:
    """What is logged of the rewards; (B,) each."""
    values = {**outcome.rewards, "accuracies": outcome.accuracies, "margins": outcome.margins}
    for name in (name for name in outcome.rewards if name not in PAIR):
        margins = outcome.rewards["chosen"] - outcome.rewards[name]
        values.update({f"{name}_accuracies": (margins > 0).float(), f"{name}_margins": margins})
    return values


def _check_layer(layer: int | None, layers: Sequence[int]) -> None:
    if layer is not None and layer not in layers:
        count = f"0 to {len(layers) - 1} (the model has {len(layers)} decoder layers)"
        expected = count if isinstance(layers, range) else f"one of {list(layers)}, which see pictures"
        raise ValueError(f"attention_layer: expected {expected}, got {layer}")
