"""`RewardTrainer`: a reward model on the token trees, pictures and processes of `PreferenceTrainer`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from mmdpo_trainers.errors import DataError
from mmdpo_trainers.training import arguments, given_models, model_parts
from mmdpo_trainers.training.batches.collator import PreferenceBatch
from mmdpo_trainers.training.batches.packing import is_streaming
from mmdpo_trainers.training.objective import Totals
from mmdpo_trainers.training.reward import score_head
from mmdpo_trainers.training.reward.config import RewardConfig
from mmdpo_trainers.training.reward.inputs import FILE, RewardInputs
from mmdpo_trainers.training.reward.loss import bradley_terry
from mmdpo_trainers.training.sharded.sharding import through_root
from mmdpo_trainers.training.trainer import PreferenceTrainer
from mmdpo_trainers.training.training_log import PAIRWISE, Averages, mean_of


class RewardTrainer(PreferenceTrainer):
    """Trains an adapter and a scalar head on chosen and rejected responses, by the Bradley-Terry loss (`reward.loss`).

    The reward of a response is read at its last token, the end token, of each branch of the token tree. Records, batches, pictures,
    processes and checkpoints are those of `PreferenceTrainer`; there is no reference model. A record may have a `margin`, as in TRL, and
    the facts that `args.facts` names (see `RewardInputs`). What is saved is the adapter with the head in it (PEFT's `modules_to_save`), and
    `reward_model.json`, which says what the model reads.

    Args:
        model: a transformers model, which gets an untrained head that follows from `args.seed`; or a PEFT model that has one.
        args: see `RewardConfig`.
        peft_config: in place of the LoRA adapter that `args` describes; the head is added to what it saves.
        others: as of `PreferenceTrainer`, but `ref_model`.

    Logged, averaged as in `PreferenceTrainer`: `loss`, and by TRL's names `accuracy` (share of records whose chosen reward is higher),
    `margin` (chosen minus rejected reward) and `mean_reward` (over both); `accuracy_<kind>` and `margin_<kind>` for records with a
    `kind`. TRL's `min_reward` and `max_reward` depend on how records fall into batches, and are not logged.

    Raises ValueError for settings that do not fit the model; DataError, naming the record, for one that cannot be used, and where no record
    has a fact that is asked for.
    """

    config_class = RewardConfig
    args: RewardConfig

    def __init__(
        self,
        model: nn.Module | str,
        args: RewardConfig,
        *,
        peft_config: PeftConfig | None = None,
        ref_model: None = None,
        **others: Any,
    ) -> None:
        arguments.check_trainer_arguments(args, {}, RewardConfig)
        if ref_model is not None:
            raise ValueError("ref_model: a reward model is compared with no reference; leave it out")
        self._check_facts(others.get("train_dataset"), args)
        model = given_models.model_of("model", model, args)
        super().__init__(model, args, peft_config=score_head.with_head(model, args, peft_config), **others)
        score_head.check_trained(self.model)

    @staticmethod
    def _check_facts(dataset: Any, args: RewardConfig) -> None:
        """DataError where no record has a fact: the model would never be told it."""
        if dataset is None or is_streaming(dataset) or not len(dataset):
            return
        missing = set(args.facts)
        for index in range(len(dataset)):
            if not missing:
                return
            record = dataset[index]
            missing -= {name for name, count in args.inputs.known([record]).items() if count}
        if missing:
            names = ", ".join(sorted(missing))
            raise DataError(f"facts: none of {len(dataset):,} records has {names}; add the columns, or leave them out of facts")

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
        """See `PreferenceTrainer`; a mean over the records of the step."""
        scores = self._scores(batch, training=training, averages=averages)
        losses = bradley_terry(scores, _margins(batch, scores), self.args.center_rewards_coefficient)
        count, records = len(batch.ids), totals.records
        found = scores.detach().double()
        accuracy, margin = (found[:, 0] > found[:, 1]).double(), found[:, 0] - found[:, 1]
        averages.add({"accuracy": mean_of(accuracy), "margin": mean_of(margin), "mean_reward": mean_of(found.mean(1))}, count)
        for kind in sorted({kind for kind in batch.kinds if kind}):
            mine = [index for index, each in enumerate(batch.kinds) if each == kind]
            averages.add({f"accuracy_{kind}": mean_of(accuracy[mine]), f"margin_{kind}": mean_of(margin[mine])}, len(mine))
        if averages is self._averages["eval"]:
            averages.add({PAIRWISE: mean_of(losses.detach())}, count)
        return losses.sum() / records, {"rewards": found}

    def _scores(self, batch: PreferenceBatch, *, training: bool, averages: Averages) -> Tensor:
        """(n, 2) rewards, in one call of the outermost module."""
        blank = self._blank_for(batch)

        def forward() -> Tensor:
            nothing = None
            if blank is None:
                features = self._features(batch)
            else:
                with self.accelerator.autocast():
                    features, nothing = model_parts.features_of_blank(self._policy, batch, blank)
            with self._recorded(batch, training=training, averages=averages), self.accelerator.autocast():
                hidden = model_parts.hidden_states(self._policy, batch, features)
            found = score_head.scores(self._policy, hidden, batch)
            return found if nothing is None else found + nothing.to(found)

        wrapped = self.model_wrapped if torch.is_grad_enabled() or self.sharding.in_shards else self.model
        return through_root(wrapped, self.sharding.inside(wrapped), forward)  # type: ignore[arg-type]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `transformers.Trainer`, with what the model reads, also beside weights in shards."""
        if self.args.should_save:
            self.args.inputs.save(output_dir or str(self.args.output_dir))
        super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As in `transformers.Trainer`. ValueError where the checkpoint's model reads something else."""
        if (Path(resume_from_checkpoint) / FILE).is_file() and RewardInputs.read(resume_from_checkpoint) != self.args.inputs:
            raise ValueError(
                f"facts: {resume_from_checkpoint} was trained with other facts, another template or no_image; train into another folder"
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)


def _margins(batch: PreferenceBatch, scores: Tensor) -> Tensor | None:
    """(n,) margins of the records, 0 where one has none; None: none has. DataError naming one that is no number."""
    if all(margin is None for margin in batch.margins):
        return None
    for name, margin in zip(batch.ids, batch.margins, strict=True):
        if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin)):
            raise DataError(f"record {name}: margin: expected a number, got {margin!r}; mend it, or remove the column")
    return scores.new_tensor([0.0 if margin is None else margin for margin in batch.margins])
