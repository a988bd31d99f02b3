"""preference_loss: closed forms at the reference, equations, gradients, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmdpo_kernels import SequenceLogps, preference_loss


def logps(seed: int, *, corrupted: bool = True) -> SequenceLogps:
    torch.manual_seed(seed)
    chosen, rejected, other = (-5 * torch.rand(6, dtype=torch.float64) for _ in range(3))
    lengths = torch.tensor([3, 1, 8, 2, 5, 4])
    return SequenceLogps(
        chosen=chosen,
        rejected=rejected,
        corrupted=other if corrupted else None,
        chosen_lengths=lengths,
        rejected_lengths=lengths.flip(0),
    )


AT_REFERENCE = {
    ("sigmoid",): math.log(2),
    ("sigmoid", "copo", "ancpo"): 3 * math.log(2),
    ("hinge",): 1.0,
    ("ipo",): 1 / (4 * 0.2**2),
}


@pytest.mark.parametrize("names", AT_REFERENCE)
def test_value_at_the_reference(names: tuple[str, ...]) -> None:
    policy = logps(0)
    found = preference_loss(policy, policy, loss_type=names, beta=0.2)
    assert found.loss.item() == pytest.approx(AT_REFERENCE[names], rel=1e-12)
    assert all((reward == 0).all() for reward in found.rewards.values())


def test_equations() -> None:
    p, r, beta = logps(0), logps(1), 0.3
    assert p.corrupted is not None and r.corrupted is not None and p.chosen_lengths is not None
    w, ll, c = p.chosen - r.chosen, p.rejected - r.rejected, p.corrupted - r.corrupted
    names = ("sigmoid", "copo", "ancpo", "nll", "hinge", "ipo")
    found = preference_loss(p, r, loss_type=names, beta=beta, anchor=0.1)

    def softplus(x: Tensor) -> Tensor:
        return (1 + x.exp()).log()

    torch.testing.assert_close(found.losses["sigmoid"], softplus(-beta * (w - ll)))
    torch.testing.assert_close(found.losses["copo"], softplus(-beta * (w - c)))
    torch.testing.assert_close(found.losses["ancpo"], softplus(0.1 - beta * w))
    torch.testing.assert_close(found.losses["nll"].mean(), -p.chosen.sum() / p.chosen_lengths.sum())
    torch.testing.assert_close(found.losses["hinge"], (1 - beta * (w - ll)).clamp(min=0))
    per_token = w / p.chosen_lengths - ll / p.rejected_lengths
    torch.testing.assert_close(found.losses["ipo"], (per_token - 1 / (2 * beta)) ** 2)
    torch.testing.assert_close(found.rewards["chosen"], beta * w)
    torch.testing.assert_close(found.margins, beta * (w - ll))
    torch.testing.assert_close(found.accuracies, (w > ll).float())


def test_weights_and_gradients() -> None:
    base, reference = logps(0), logps(1)
    names, weights = ("sigmoid", "nll", "ancpo"), (1.0, 0.5, 2.0)

    def run(chosen: Tensor, rejected: Tensor) -> Tensor:
        policy = SequenceLogps(chosen=chosen, rejected=rejected, chosen_lengths=base.chosen_lengths)
        return preference_loss(policy, reference, loss_type=names, loss_weights=weights).loss

    single = [preference_loss(base, reference, loss_type=(name,)).loss for name in names]
    torch.testing.assert_close(run(base.chosen, base.rejected), sum(w * s for w, s in zip(weights, single, strict=True)))
    assert torch.autograd.gradcheck(run, (base.chosen.requires_grad_(), base.rejected.requires_grad_()))


def test_reference_carries_no_gradient() -> None:
    policy, reference = logps(0), logps(1)
    policy.chosen.requires_grad_()
    reference.chosen.requires_grad_()
    preference_loss(policy, reference).loss.backward()
    assert policy.chosen.grad is not None
    assert reference.chosen.grad is None


def test_errors_name_the_argument() -> None:
    policy = logps(0, corrupted=False)
    with pytest.raises(ValueError, match="loss_type must name losses among .* got 'dpo'"):
        preference_loss(policy, loss_type=("dpo",))
    with pytest.raises(ValueError, match="loss_weights must have one entry a loss"):
        preference_loss(policy, loss_weights=(1.0, 2.0))
    with pytest.raises(ValueError, match="policy.corrupted is None"):
        preference_loss(policy, loss_type=("copo",))
    with pytest.raises(ValueError, match="beta must be above 0"):
        preference_loss(policy, beta=0.0)
    with pytest.raises(ValueError, match="'nll' needs policy.chosen_lengths"):
        preference_loss(SequenceLogps(chosen=policy.chosen, rejected=policy.rejected), loss_type=("nll",))


@pytest.mark.parametrize("lengths", [torch.ones(6, 1), torch.ones(1)])
def test_lengths_must_fit(lengths: Tensor) -> None:
    policy = logps(0)
    wrong = SequenceLogps(chosen=policy.chosen, rejected=policy.rejected, chosen_lengths=lengths, rejected_lengths=lengths)
    with pytest.raises(ValueError, match=r"policy.chosen_lengths must have shape \(6\)"):
        preference_loss(wrong, loss_type=("nll",))


def test_half_precision_is_computed_in_float32() -> None:
    half = SequenceLogps(
        chosen=torch.tensor([-300.0], dtype=torch.bfloat16),
        rejected=torch.tensor([-301.0], dtype=torch.bfloat16),
        chosen_lengths=torch.tensor([257]),
    )
    found = preference_loss(half, loss_type=("nll",)).loss
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(half.chosen.item() / -257, rel=1e-6)
