"""preference_loss against the losses of TRL's trainers: their own methods run, on the same token log-probabilities."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdpo_kernels import SequenceLogps, preference_loss, sequence_logps

pytest.importorskip("trl", reason="TRL is a peer, installed with the extra `peers`")

BETA = 0.3
PROMPT = 2
CHOSEN_LENGTHS, REJECTED_LENGTHS = [3, 1, 6, 2], [2, 5, 4, 1]
LENGTHS = [*CHOSEN_LENGTHS, *REJECTED_LENGTHS]
PAIRS = len(CHOSEN_LENGTHS)


@dataclass
class Tokens:
    """Token log-probabilities of four pairs, all chosen responses first, with a gradient on the policy's."""

    policy: Tensor
    reference: Tensor

    @classmethod
    def random(cls) -> Tokens:
        generator = torch.Generator().manual_seed(0)
        policy, reference = (-3 * torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64) - 0.05 for _ in range(2))
        return cls(policy.requires_grad_(), reference)

    def ours(self, **options: Any) -> Tensor:
        sums = [sequence_logps(tokens, LENGTHS).chunk(2) for tokens in (self.policy, self.reference)]
        policy, reference = (SequenceLogps(chosen=chosen, rejected=rejected, **lengths()) for chosen, rejected in sums)
        return preference_loss(policy, reference, beta=BETA, **options).loss


def lengths() -> dict[str, Tensor]:
    return {"chosen_lengths": torch.tensor(CHOSEN_LENGTHS), "rejected_lengths": torch.tensor(REJECTED_LENGTHS)}


def padded(tokens: Tensor, counts: list[int]) -> Tensor:
    """(n, T - 1) as a model's shifted outputs are: zeros under the prompt and behind the response."""
    width = PROMPT + max(LENGTHS)
    rows = []
    for piece in tokens.split(counts):
        rows.append(torch.cat([piece.new_zeros(PROMPT - 1), piece, piece.new_zeros(width - PROMPT - len(piece))]))
    return torch.stack(rows)


def completion_mask(counts: list[int]) -> Tensor:
    """(n, T), 1 on the response's tokens."""
    places = torch.arange(PROMPT + max(LENGTHS)) - PROMPT
    return ((places >= 0) & (places < torch.tensor(counts)[:, None])).long()


def outputs(tokens: Tensor, counts: list[int]) -> SimpleNamespace:
    log_probs = padded(tokens, counts)
    zeros = torch.zeros_like(log_probs)
    return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def bare(trainer: type, **attributes: Any) -> Any:
    """A trainer without its constructor: its loss reads these attributes alone."""
    made: Any = object.__new__(trainer)
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    common = {
        "model": SimpleNamespace(training=True),
        "accelerator": accelerator,
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "beta": BETA,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for name, value in {**common, **attributes}.items():
        setattr(made, name, value)
    return made


def dpo_trainer_loss(tokens: Tokens, loss_type: list[str], loss_weights: list[float], label_smoothing: float = 0.0) -> Tensor:
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer = bare(
        DPOTrainer,
        loss_types=loss_type,
        loss_weights=loss_weights,
        label_smoothing=label_smoothing,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )
    chosen, rejected = sequence_logps(tokens.reference, LENGTHS).chunk(2)
    mask = completion_mask(LENGTHS)
    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    return trainer._compute_loss(lambda **kwargs: outputs(tokens.policy, LENGTHS), inputs, False)


def check_same(tokens: Tokens, ours: Tensor, theirs: Tensor) -> None:
    """Value and gradient on every token, to float64 rounding."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(loss, tokens.policy)[0] for loss in (ours, theirs)]
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-13)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({"loss_type": ["sigmoid"]}, {"loss_type": ["sigmoid"]}),
    "hinge": ({"loss_type": ["hinge"]}, {"loss_type": ["hinge"]}),
    "ipo": ({"loss_type": ["ipo"]}, {"loss_type": ["ipo"]}),
    "robust": ({"loss_type": ["robust"], "label_smoothing": 0.2}, {"loss_type": ["robust"], "label_smoothing": 0.2}),
    "robust without noise": ({"loss_type": ["robust"]}, {"loss_type": ["robust"]}),
    "bco_pair": ({"loss_type": ["bco_pair"]}, {"loss_type": ["bco_pair"]}),
    "nll": ({"loss_type": ["nll"]}, {"loss_type": ["sft"]}),
    "sigmoid, length-normalised": ({"loss_type": ["sigmoid"], "length_normalised": True}, {"loss_type": ["sigmoid_norm"]}),
    "weighted list": (
        {"loss_type": ["sigmoid", "nll", "bco_pair"], "loss_weights": [0.8, 1.0, 0.2]},
        {"loss_type": ["sigmoid", "sft", "bco_pair"], "loss_weights": [0.8, 1.0, 0.2]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_dpo_trainer(case: str) -> None:
    tokens = Tokens.random()
    ours, theirs = CASES[case]
    theirs = {"loss_weights": [1.0] * len(theirs["loss_type"]), **theirs}
    check_same(tokens, tokens.ours(**ours), dpo_trainer_loss(tokens, **theirs))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_conservative_dpo_is_cpo_trainers_smoothed_sigmoid_on_log_ratios(label_smoothing: float) -> None:
    """TRL's DPOTrainer has no cDPO; its CPOTrainer smooths the same sigmoid, here given log-ratios in place of log-probabilities."""
    CPOTrainer = pytest.importorskip("trl.experimental.cpo", reason="this TRL has no CPOTrainer").CPOTrainer
    tokens = Tokens.random()
    trainer = bare(CPOTrainer, alpha=0.0, loss_type="sigmoid", label_smoothing=label_smoothing)
    ratios = sequence_logps(tokens.policy - tokens.reference, LENGTHS).chunk(2)
    theirs = trainer.cpo_loss(*ratios)[0].mean()
    check_same(tokens, tokens.ours(loss_type=["cdpo"], label_smoothing=label_smoothing), theirs)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_simpo_is_cpo_trainers() -> None:
    CPOTrainer = pytest.importorskip("trl.experimental.cpo", reason="this TRL has no CPOTrainer").CPOTrainer
    tokens = Tokens.random()
    trainer = bare(CPOTrainer, alpha=0.0, loss_type="simpo", simpo_gamma=0.7, label_smoothing=0.0)
    means = sequence_logps(tokens.policy, LENGTHS) / torch.tensor(LENGTHS)
    theirs = trainer.cpo_loss(*means.chunk(2))[0].mean()
    check_same(tokens, tokens.ours(loss_type=["simpo"], simpo_gamma=0.7), theirs)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_orpo_is_orpo_trainers_odds_ratio_term() -> None:
    """TRL gives the term with its sign turned and computes it in float32."""
    ORPOTrainer = pytest.importorskip("trl.experimental.orpo", reason="this TRL has no ORPOTrainer").ORPOTrainer
    tokens = Tokens.random()
    means = sequence_logps(tokens.policy, LENGTHS) / torch.tensor(LENGTHS)
    theirs = -bare(ORPOTrainer).odds_ratio_loss(*means.chunk(2))[0].mean()
    ours = tokens.ours(loss_type=["orpo"])
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=0)
    grads = [torch.autograd.grad(loss, tokens.policy)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("drift", [0.4, -0.4])
def test_kto_pair_is_kto_trainer_with_the_other_half_as_mismatched_responses(drift: float) -> None:
    """`drift` raises or lowers the policy's log-probabilities, so that the KL estimates are above 0 or cut off there."""
    from trl.trainer.kto_trainer import KTOTrainer

    tokens = Tokens.random()
    tokens.reference = tokens.policy.detach() - drift
    halves = [(CHOSEN_LENGTHS, True), (REJECTED_LENGTHS, False)]
    policy, reference = (x.split([sum(CHOSEN_LENGTHS), sum(REJECTED_LENGTHS)]) for x in (tokens.policy, tokens.reference))
    losses = []
    for own, (counts, label) in enumerate(halves):
        other_counts = halves[1 - own][0]
        trainer = bare(KTOTrainer, loss_type="kto", calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0)
        mask, other_mask = completion_mask(counts), completion_mask(other_counts)
        inputs = {
            "input_ids": torch.ones_like(mask),
            "attention_mask": torch.ones_like(mask),
            "completion_mask": mask,
            "KL_input_ids": torch.full_like(other_mask, 2),
            "KL_attention_mask": torch.ones_like(other_mask),
            "KL_completion_mask": other_mask,
            "label": torch.full((PAIRS,), label),
            "ref_logps": sequence_logps(reference[own], counts),
            "ref_KL_logps": sequence_logps(reference[1 - own], other_counts),
        }
        sides = {1: outputs(policy[own], counts), 2: outputs(policy[1 - own], other_counts)}
        losses.append(trainer._compute_loss(lambda sides=sides, **kwargs: sides[int(kwargs["input_ids"][0, 0])], inputs, False))
    check_same(tokens, tokens.ours(loss_type=["kto_pair"]), (losses[0] + losses[1]) / 2)
