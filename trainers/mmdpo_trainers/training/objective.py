"""The loss of a micro-batch from its log-probabilities, what it is made of, and what the log says of it."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdpo_kernels import PreferenceLoss, SequenceLogps, TokenLogps, preference_loss
from mmdpo_trainers.training.batches.collator import PreferenceBatch
from mmdpo_trainers.training.config import PreferenceConfig
from mmdpo_trainers.training.running_shift import RunningShift
from mmdpo_trainers.training.training_log import PAIRWISE, Averages, mean_of, rewards_of

Reference = SequenceLogps | TokenLogps | None


class Objective:
    """The losses that `args` name, with the running shift of "bco_pair" where that is among them."""

    def __init__(self, args: PreferenceConfig) -> None:
        self.args = args
        self.shift = RunningShift(args.bco_shift if "bco_pair" in args.loss_type else "none")

    def loss(
        self,
        batch: PreferenceBatch,
        policy: TokenLogps,
        reference: Reference,
        *,
        records: int,
        tokens: int,
        averages: Averages,
        evaluating: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and what it is made of by name; its means go into `averages`. records, tokens: of the whole optimizer step."""
        weights, count = self.args.weight_of, len(batch.ids)
        parts: dict[str, Tensor] = {}
        outcomes: list[PreferenceLoss] = []
        loss = policy.logps.new_zeros(())
        pairwise = [name for name in weights if name != "nll"]
        if pairwise:
            outcome = self._outcome(policy, reference, {name: weights[name] for name in pairwise})
            outcomes.append(outcome)
            loss = loss + outcome.loss * (count / records)
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
            loss = loss + weights["nll"] * nll.loss * (batch.chosen_tokens / tokens)
            parts["nll"] = nll.loss.detach()
            averages.add({"nll_loss": parts["nll"]}, batch.chosen_tokens)
        averages.add({f"logps/{name}": mean_of(value) for name, value in outcomes[0].logps.items()}, count)
        return loss, parts | {f"logps/{name}": value.detach() for name, value in outcomes[0].logps.items()}

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
