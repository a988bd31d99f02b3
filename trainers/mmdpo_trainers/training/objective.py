"""The loss of a micro-batch from its log-probabilities, what it is made of, and what the log says of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmdpo_kernels import PreferenceLoss, SequenceLogps, TokenLogps, preference_loss
from mmdpo_trainers.training.attention_target import target_losses
from mmdpo_trainers.training.batches.collator import PreferenceBatch
from mmdpo_trainers.training.config import PreferenceConfig
from mmdpo_trainers.training.running_shift import RunningShift
from mmdpo_trainers.training.training_log import PAIRWISE, Averages, mean_of, rewards_of

Reference = SequenceLogps | TokenLogps | None


class Totals(NamedTuple):
    """What the means of an optimizer step are over."""

    records: int
    tokens: int
    """Of chosen responses."""
    targets: int
    """Records with an attention target."""
    batches: int

    @classmethod
    def of(cls, batches: Sequence[PreferenceBatch]) -> Totals:
        """Of some micro-batches."""
        targets = (0 if batch.attention_targets is None else len(batch.attention_targets.records) for batch in batches)
        records, tokens = sum(len(batch.ids) for batch in batches), sum(batch.chosen_tokens for batch in batches)
        return cls(records, tokens, sum(targets), len(batches))


class Objective:
    """The losses that `args` name, with the running shift of "bco_pair" where that is among them.

    balance_weight: factor of the load-balancing loss of a mixture-of-experts model; 0: there is none.
    """

    def __init__(self, args: PreferenceConfig, balance_weight: float = 0.0) -> None:
        self.args, self.balance_weight = args, balance_weight
        self.shift = RunningShift(args.bco_shift if "bco_pair" in args.loss_type else "none")

    def loss(
        self,
        batch: PreferenceBatch,
        policy: TokenLogps,
        reference: Reference,
        maps: Tensor | None = None,
        balance: Tensor | None = None,
        *,
        totals: Totals,
        averages: Averages,
        evaluating: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and what it is made of by name; its means go into `averages`.

        maps: of the batch's attention targets. balance: its load-balancing loss. totals: of the whole optimizer step.
        """
        weights, count = self.args.weight_of, len(batch.ids)
        parts: dict[str, Tensor] = {}
        outcomes: list[PreferenceLoss] = []
        loss = policy.logps.new_zeros(())
        pairwise = [name for name in weights if name != "nll"]
        if pairwise:
            outcome = self._outcome(policy, reference, {name: weights[name] for name in pairwise})
            outcomes.append(outcome)
            loss = loss + outcome.loss * (count / totals.records)
            if evaluating:
                averages.add({PAIRWISE: outcome.loss.detach()}, count)
            parts |= {name: outcome.losses[name].detach() for name in pairwise}
            averages.add({f"rewards/{name}": mean_of(value) for name, value in rewards_of(outcome).items()}, count)
            for kind in sorted({kind for kind in batch.kinds if kind}):
                mine = [index for index, each in enumerate(batch.kinds) if each == kind]
                averages.add(
                    {f"rewards/{name}_{kind}": mean_of(value[mine]) for name, value in outcome.rewards.items()}, len(mine)
                )
            if self.shift.kind != "none":
                averages.add({"bco_shift": self.shift.value}, count)
        if "nll" in weights:
            # A loss of its own, as it is averaged over tokens and not over records.
            nll = preference_loss(policy, loss_type=("nll",))
            outcomes.append(nll)
            loss = loss + weights["nll"] * nll.loss * (batch.chosen_tokens / totals.tokens)
            parts["nll"] = nll.loss.detach()
            averages.add({"nll_loss": parts["nll"]}, batch.chosen_tokens)
        if self.args.attention_target is not None:
            looked = self._attention_target(batch, maps, totals, averages)
            loss = loss + looked
            parts["attention_target"] = looked.detach()
        if balance is not None:
            # It is one number of a micro-batch, whose tokens its routers deal out: a mean over these, as in TRL.
            loss = loss + self.balance_weight * balance / totals.batches
            parts["aux_loss"] = balance.detach()
            averages.add({"aux_loss": parts["aux_loss"]}, 1)
        averages.add({f"logps/{name}": mean_of(value) for name, value in outcomes[0].logps.items()}, count)
        return loss, parts | {f"logps/{name}": value.detach() for name, value in outcomes[0].logps.items()}

    def _attention_target(self, batch: PreferenceBatch, maps: Tensor | None, totals: Totals, averages: Averages) -> Tensor:
        """Weighted, as a mean over the step's records that have a target; the others are left out, and counted in the log."""
        args, targets = self.args, batch.attention_targets
        count = 0 if targets is None else len(targets.records)
        averages.add({"attn/targeted": count / len(batch.ids)}, len(batch.ids))
        if targets is None or maps is None or args.attention_target is None:
            return torch.zeros(()) if maps is None else 0 * maps.sum()
        losses, shares = target_losses(args.attention_target, maps, targets)
        averages.add({"attn/target_loss": mean_of(losses.detach())}, count)
        seen = shares.detach()[~shares.isnan()]
        if len(seen):
            averages.add({"attn/target_share": mean_of(seen)}, len(seen))
        # A micro-batch that repeats others may have targets where the step has none.
        return args.attention_target_weight * losses.sum() / max(totals.targets, 1)

    def take_rewards(self, policy: TokenLogps, reference: Reference, *, counts: bool) -> None:
        """Let the running shift know a micro-batch of training before its loss is made. counts: whether its records count."""
        if self.shift.kind == "none":
            return
        with torch.no_grad():
            rewards = preference_loss(
                policy,
                reference,
                loss_type=("bco_pair",),
                beta=self.args.beta,
                length_normalised=self.args.length_normalised,
            ).rewards
        mean = (mean_of(rewards["chosen"]) + mean_of(rewards["rejected"])) / 2
        self.shift.take(mean, len(rewards["chosen"]) if counts else 0, policy.logps.device)

    def _outcome(self, policy: TokenLogps, reference: Reference, weights: dict[str, float]) -> PreferenceLoss:
        options = self.args.loss_parameters._replace(bco_shift=self.shift.value)
        return preference_loss(
            policy,
            reference,
            loss_type=list(weights),
            loss_weights=list(weights.values()),
            length_normalised=self.args.length_normalised,
            **options._asdict(),
        )
