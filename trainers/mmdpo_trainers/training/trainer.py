"""`PreferenceTrainer`: preference training of vision-language models on `transformers.Trainer`, one token tree a micro-batch."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from mmdpo_kernels import SequenceLogps, TokenLogps, record_attention
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.models.families import EncodedImages, family_of
from mmdpo_trainers.processes import collectives
from mmdpo_trainers.processes.progress import Progress
from mmdpo_trainers.training import arguments, given_models, head, model_parts, router_loss
from mmdpo_trainers.training.attention_target import recorded_maps
from mmdpo_trainers.training.batches.collator import PreferenceBatch, PreferenceCollator, collator_of
from mmdpo_trainers.training.batches.packing import batch_sampler, check_datasets, is_streaming, short_enough
from mmdpo_trainers.training.checkpoints import SavingTrainer
from mmdpo_trainers.training.config import PreferenceConfig
from mmdpo_trainers.training.objective import Objective, Totals
from mmdpo_trainers.training.online.pairs import OnlinePairs, uncollated
from mmdpo_trainers.training.reference.precompute import Precomputed, ReferencePass
from mmdpo_trainers.training.reference.reference import Reference
from mmdpo_trainers.training.sharded.batches import COUNTS, batches_of, sharded_loader, train_loader
from mmdpo_trainers.training.sharded.sharding import Sharding, through_root
from mmdpo_trainers.training.stopping import GradientCheck, LossCheck, connected
from mmdpo_trainers.training.training_log import Averages
from mmdpo_trainers.training.training_mode import offload_checkpoints, quiet


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
        online: pairs made of answers that the policy gives in training; the records of `train_dataset` are what it is asked.
        others: TRL's arguments that are not here: an error says what is in their place.

    `train(resume_from_checkpoint="auto")` continues from the last whole checkpoint of `output_dir`, or starts. With the same
    number of threads a continued run ends with the same weights, bit for bit, as one that was never interrupted.

    Started in several processes (DDP, DeepSpeed ZeRO-2 and ZeRO-3, FSDP2: docs/scaling.md) it ends as in one that has all their records.

    Logged, averaged over records, micro-batches and the logging interval (evaluation: with prefix `eval_`): `loss`,
    `rewards/chosen`, `rewards/rejected`, `rewards/accuracies`, `rewards/margins` (unless `nll` is the only loss; without a
    reference they are beta times log-probabilities),
    `rewards/<branch>`, `rewards/<branch>_accuracies` and `rewards/<branch>_margins` (of chosen over it) for other branches,
    `rewards/chosen_<kind>` and so on for records with a `kind`, `logps/chosen`, `logps/rejected`, `nll_loss` (per token, where
    that loss is used), `bco_shift` where it runs, and `attn/ratio_<format>`: the share of the attention on a record's pictures that its
    chosen response gives the asked-about one; with `attention_target` `attn/target_loss`, `attn/target_share` (of the pictures' attention) and
    `attn/targeted`, the share of the records that have a target; of mixture-of-experts models `aux_loss`, a mean over micro-batches. With tree
    packing, pictures that several records of a micro-batch share count once, for the first of these records; a record whose pictures get no
    attention is left out.
    `eval_loss` is the loss of all records as one batch, whatever the evaluation batch size (but for `kto_pair` and `aux_loss`, which look at
    batches).

    Checkpoints are told by markers in their folders: what others wrote into `output_dir` is reported, and never removed.

    Raises ValueError for settings that do not fit the model; DataError, naming the record, for one that cannot be used.
    """

    config_class: type[PreferenceConfig] = PreferenceConfig
    """What `args` must be."""
    args: PreferenceConfig
    data_collator: PreferenceCollator  # type: ignore[assignment]
    objective: Objective

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
        online: OnlinePairs | None = None,
        **others: Any,
    ) -> None:
        arguments.check_trainer_arguments(args, others, self.config_class)
        check_datasets(train_dataset, eval_dataset, args)
        self.online = online
        if online is not None:
            train_dataset, eval_dataset = online.records(train_dataset, args), online.evaluated(eval_dataset, args)
        _keep_batches_whole(args, [train_dataset, *_as_list(eval_dataset)])
        self.args = args
        policy, self.ref_model, processing_class = given_models.policy_and_reference(
            model, args, peft_config, ref_model, processing_class
        )
        self.router_aux_loss_coef = router_loss.coefficient(policy, args)
        self.objective: Objective = Objective(args, self.router_aux_loss_coef)
        self._router_loss = router_loss.RouterLoss(policy) if self.router_aux_loss_coef else None
        packs = model_parts.packs_trees(policy, args)
        given_models.prepare(policy, args, packs=packs)
        if self.ref_model is not None:
            given_models.prepare(self.ref_model, args, packs=packs)
        shares_features = ref_model is None and model_parts.sees_as_reference(policy)
        shares_head = ref_model is None and head.heads_alike(policy)
        base = model_parts.base_of(policy)
        pool = train_dataset if train_dataset is not None else next(iter(_as_list(eval_dataset)))
        collator = collator_of(base, processing_class, args, pool, tree_packing=packs)
        self.progress = progress or Progress()
        self.left_out: list[str] = []
        """Names of records longer than `max_length`."""
        self._uneven = model_parts.skips_images(policy)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = self._uneven or model_parts.has_experts(policy)
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
        self._reference_pass = ReferencePass(
            args,
            processor=processing_class,
            progress=self.progress,
            autocast=self.accelerator.autocast,
            logps=self._reference_logps,
            in_shards=self.sharding.in_shards,
        )
        if self.ref_model is not None and self.sharding.in_shards:
            self._reference_pass.name(self.ref_model)
        self.reference = Reference(
            policy,
            self.ref_model,
            shares_features=shares_features,
            shares_head=shares_head,
            autocast=self.accelerator.autocast,
            wrapped=None if self.ref_model is None else self.sharding.frozen(self.ref_model),
        )
        self._loss_check = LossCheck()
        if online is not None:
            online.bind(self)
        # What other processes' batches make a process run, although its own has no picture.
        self._blank = model_parts.blank_image(family_of(base), processing_class) if args.world_size > 1 else None

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
        else:
            self._reference_pass.name(self.reference.model)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

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

        num_items_in_batch: (4,) int64, `Totals` of the whole step; None: the micro-batch is all there is.
        """
        if model.training:
            quiet(self._policy)
        batch: PreferenceBatch = inputs["batch"].to(self.args.device)
        counts = inputs.get(COUNTS, True)
        averages = self._averages["train" if model.training else "eval"] if counts else Averages()
        totals = Totals.of([batch]) if num_items_in_batch is None else Totals(*num_items_in_batch.tolist())
        loss, parts = self._batch_loss(
            batch, inputs.get("reference_batch"), totals, training=model.training, averages=averages, counts=counts
        )
        if model.training and self.args.stop_on_nonfinite_loss:
            self._loss_check.look(loss, batch.ids, parts)
            if self.accelerator.sync_gradients:
                self._loss_check.stop(self.state.global_step + 1, self.args.device, self._kept)
        if model.training and not self.sharding.in_shards:
            loss = connected(loss, self._policy)
        if not counts:
            loss = loss * 0
        if model.training and collectives.is_distributed():
            # The mean over processes that gradients and logs are is to be a sum.
            loss = loss * self.args.world_size
        return (loss, {}) if return_outputs else loss

    def _batch_loss(
        self,
        batch: PreferenceBatch,
        reference_batch: PreferenceBatch | None,
        totals: Totals,
        *,
        training: bool,
        averages: Averages,
        counts: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch's share of the loss of its step, and what it is made of by name. counts: whether its records count."""
        policy, reference, maps, balance = self._logps(batch, reference_batch, training=training, averages=averages)
        if training:
            self.objective.take_rewards(policy, reference, counts=counts)
        found = self.objective.loss(
            batch,
            policy,
            reference,
            maps,
            balance,
            totals=totals,
            averages=averages,
            evaluating=averages is self._averages["eval"],
        )
        if training and self.accelerator.sync_gradients:
            self.objective.shift.step(self.args.device)
        return found

    def _logps(
        self, batch: PreferenceBatch, reference_batch: PreferenceBatch | None, *, training: bool, averages: Averages
    ) -> tuple[TokenLogps, SequenceLogps | TokenLogps | None, Tensor | None, Tensor | None]:
        """The policy's and, where a loss looks at it, the reference's log-probabilities, attention maps of `attention_target`, and the
        load-balancing loss.

        All in one call of the outermost module.

        reference_batch: with separate draws of the corruption the reference's own, with pictures of its own.
        """
        args, reference = self.args, self.reference
        theirs = batch if reference_batch is None else reference_batch.to(args.device)
        cached = reference.cached(theirs) if args.needs_reference else None
        runs = args.needs_reference and cached is None
        blank = self._blank_for(batch)
        everywhere = args.attention_target is not None and collectives.is_distributed() and torch.is_grad_enabled()

        def forward() -> tuple[Tensor, ...]:
            features, nothing = self._features(batch), None
            if blank is not None:
                with self.accelerator.autocast():
                    features, nothing = model_parts.features_of_blank(self._policy, batch, blank)
            shared = features if reference_batch is None else None
            beside = runs and reference.scored_beside_policy
            rows = reference.rows(theirs, shared, blank) if beside else None
            others = (reference.token_logps(theirs, shared, blank),) if runs and not beside else ()
            targets = recorded_maps(self._policy, batch.attention_targets, args.target_layer, everywhere=everywhere)
            routed = contextlib.nullcontext() if self._router_loss is None else self._router_loss.taken(batch.sequence_counts)
            recorded = self._recorded(batch, training=training, averages=averages)
            with recorded, targets as maps, routed as balance, self.accelerator.autocast():
                hidden = model_parts.hidden_states(self._policy, batch, features)
            hidden, *balanced = (hidden,) if balance is None else balance.beside(hidden)
            # The head stays out of autocast: its log-probabilities are made in float32.
            scored = head.scored_rows(hidden, batch)
            if rows is None:
                mine = head.token_logps(self._policy, scored, batch)
            else:
                mine, *others = head.token_logps_beside(self._policy, scored, batch, rows, theirs)  # type: ignore[assignment]
            looked = () if maps is None else (maps.maps,)
            return mine if nothing is None else mine + nothing.to(mine), *balanced, *looked, *others

        wrapped = self.model_wrapped if torch.is_grad_enabled() or self.sharding.in_shards else self.model
        mine, *others = through_root(wrapped, self.sharding.inside(wrapped), forward)  # type: ignore[arg-type]
        balance = others.pop(0) if self._router_loss is not None else None
        found = others.pop(0) if everywhere or batch.attention_targets is not None else None
        return batch.token_logps(mine), batch.token_logps(others[0]) if runs else cached, found, balance

    def _blank_for(self, batch: PreferenceBatch) -> EncodedImages | None:
        """The blank picture, where this process has to run one beside others that have pictures."""
        matters = self.sharding.in_shards or (self._uneven and torch.is_grad_enabled())
        if not (matters and collectives.is_distributed()):
            return None
        somewhere = collectives.any_rank(batch.pictures is not None, self.args.device)
        return self._blank if somewhere and batch.pictures is None else None

    def _further_state(self) -> dict[str, Any]:
        return {"bco_shift": self.objective.shift.state()}

    def _load_further_state(self, state: Mapping[str, Any]) -> None:
        self.objective.shift.load(state.get("bco_shift"))

    def _features(self, batch: PreferenceBatch) -> list[Tensor]:
        with self.accelerator.autocast():
            return model_parts.image_features(self._policy, batch)

    def precompute_reference(self, *datasets: Any) -> list[Precomputed]:
        """Run the reference over the records that its cache does not hold yet; nothing unless `precompute_ref_log_probs` is set.

        datasets: as `train_dataset`; none: the trainer's own. `train` and `evaluate` do this by themselves. A killed pass
        continues where it stopped. Returns what was done for each dataset not seen before. Raises StaleCacheError where the cache was
        made by another reference.
        """
        chosen = datasets or (self.train_dataset, *_as_list(self.eval_dataset))
        return self._reference_pass.over(self.reference, self.data_collator, chosen)

    def _reference_logps(self, batch: PreferenceBatch) -> Tensor:
        """(n, b) log-probabilities of a batch of the reference's pass; the adapter is off."""
        batch, blank = batch.to(self.args.device), self._blank_for(batch)
        if self.ref_model is not None or not self.sharding.in_shards:
            return self.reference.response_logps(batch, blank)
        wrapped = self.model_wrapped
        return through_root(wrapped, self.sharding.inside(wrapped), lambda: self.reference.response_logps(batch, blank))

    def get_train_dataloader(self) -> DataLoader:
        """As in `transformers.Trainer`; with `max_tokens_per_batch` or `group_by_pictures` of batches made once, in a new order each epoch."""
        args, dataset = self.args, self.train_dataset
        packed = args.max_tokens_per_batch or args.group_by_pictures
        if dataset is None or not (packed or args.world_size > 1 or self.online):
            return super().get_train_dataloader()
        if packed:
            sampler: Any = batch_sampler(dataset, self.data_collator, args, self.progress)
        else:
            records, size = self._get_train_sampler(), self._train_batch_size
            sampler = batches_of(records, size, drop_last=args.dataloader_drop_last, data_seed=args.data_seed)
        collator = self.data_collator if self.online is None else uncollated
        return train_loader(dataset, sampler, collator, args, self.accelerator)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """As in `transformers.Trainer`; online pairs are made here, of all micro-batches of the optimizer step."""
        if self.online is not None:
            epoch_iterator = iter(self.online.batches(list(itertools.islice(epoch_iterator, num_batches))))
        return super().get_batch_samples(epoch_iterator, num_batches, device)

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
        # A step may have no record, where nothing is divided.
        return torch.tensor(collectives.all_reduce(Totals.of(batches), device)).clamp(min=1)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As in `transformers.Trainer`."""
        given = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(given, str):  # transformers evaluates a dictionary of datasets name by name
            given = self.eval_dataset[given]  # type: ignore[index, call-overload]
        check_datasets(None, given, self.args)
        self.precompute_reference(*_as_list(given))
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)


class _RestoreLog(TrainerCallback):
    def __init__(self, trainer: PreferenceTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._restore_log()
        if self.trainer.online is not None:
            self.trainer.online.begin()
        if self.trainer._reference_waits:
            self.trainer.precompute_reference()
        if self.trainer.args.activation_offloading:
            offload_checkpoints(self.trainer._policy)


def _as_list(dataset: Any) -> list[Any]:
    """A dataset, or a dictionary of them, as a list."""
    return list(dataset.values()) if isinstance(dataset, dict) else [dataset]


def _keep_batches_whole(args: PreferenceConfig, datasets: list[Any]) -> None:
    """Switch off what would split or join micro-batches. ValueError for a strategy that does so by itself."""
    if args.n_gpu > 1:
        # DataParallel would split a batch that is one tree.
        args._n_gpu = 1
    if args.world_size > 1 and args.train_sampling_strategy == "batch_rebalance":
        raise ValueError("train_sampling_strategy: batch_rebalance deals records out by itself; use max_tokens_per_batch")
    if any(map(is_streaming, datasets)):
        # accelerate would put records of several batches together.
        args.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]
