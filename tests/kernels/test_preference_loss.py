"""preference_loss and sequence_logps: closed forms at the reference, equations, gradients, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdpo_kernels import SequenceLogps, TokenLogps, preference_loss, sequence_logps
from mmdpo_kernels.backends.registry import load
from mmdpo_kernels.losses import LOSSES, NEEDS_CORRUPTED, NEEDS_LENGTHS, REFERENCE_FREE, values_of

LN2 = math.log(2)
MDPO = ("sigmoid", "copo", "ancpo")
BRANCHES = ("chosen", "rejected", "corrupted")
USUAL = tuple(name for name in LOSSES if {value.branch for value in values_of(name)} <= set(BRANCHES))
"""Losses of the branches that sums have names for."""


@pytest.fixture(autouse=True, params=["reference", "native"])
def each_backend_of_float64(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said here holds for every backend that takes float64."""
    reason = load("preference_loss", request.param).unavailable_reason("cpu", torch.float64)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setitem(globals(), "preference_loss", partial(preference_loss, backend=request.param))


def logps(seed: int, *, corrupted: bool = True) -> SequenceLogps:
    torch.manual_seed(seed)
    chosen, rejected, other = (-5 * torch.rand(6, dtype=torch.float64) - 0.1 for _ in range(3))
    lengths = torch.tensor([3, 1, 8, 2, 5, 4])
    return SequenceLogps(
        chosen=chosen,
        rejected=rejected,
        corrupted=other if corrupted else None,
        chosen_lengths=lengths,
        rejected_lengths=lengths.flip(0),
    )


def softplus(x: Tensor) -> Tensor:
    return (1 + x.exp()).log()


AT_REFERENCE: dict[str, tuple[tuple[str, ...], dict[str, Any], float]] = {
    "sigmoid": (("sigmoid",), {}, LN2),
    "mdpo": (MDPO, {}, 3 * LN2),
    "hinge": (("hinge",), {}, 1.0),
    "ipo": (("ipo",), {}, 1 / (4 * 0.2**2)),
    "cdpo": (("cdpo",), {"label_smoothing": 0.3}, LN2),
    "robust": (("robust",), {"label_smoothing": 0.3}, LN2),
    "bco_pair": (("bco_pair",), {}, 2 * LN2),
    "bco_pair with a shift": (("bco_pair",), {"bco_shift": 0.7}, math.log1p(math.exp(0.7)) + math.log1p(math.exp(-0.7))),
    "kto_pair": (("kto_pair",), {}, 0.5),
    "copo": (("copo",), {}, LN2),
    "ancpo": (("ancpo",), {"anchor": 0.4}, math.log1p(math.exp(0.4))),
    "ancpo below": (("ancpo",), {"anchor": 0.4, "anchors": ("rejected", "corrupted")}, 2 * math.log1p(math.exp(-0.4))),
    "ancpo all": (("ancpo",), {"anchors": ("chosen", "rejected", "corrupted")}, 3 * LN2),
}


@pytest.mark.parametrize("length_normalised", [False, True])
@pytest.mark.parametrize("case", AT_REFERENCE)
def test_value_at_the_reference(case: str, length_normalised: bool) -> None:
    names, options, value = AT_REFERENCE[case]
    policy = logps(0)
    found = preference_loss(policy, policy, loss_type=names, beta=0.2, length_normalised=length_normalised, **options)
    assert found.loss.item() == pytest.approx(value, rel=1e-12)
    assert all((reward == 0).all() for reward in found.rewards.values())


def test_value_of_reference_free_losses_where_both_responses_have_one_mean() -> None:
    lengths = torch.tensor([4, 2], dtype=torch.float64)
    policy = SequenceLogps(
        chosen=-0.3 * lengths, rejected=-0.3 * lengths.flip(0), chosen_lengths=lengths, rejected_lengths=lengths.flip(0)
    )
    names = ("simpo", "orpo", "nll", "mean_nll")
    found = preference_loss(policy, loss_type=names, beta=0.2, simpo_gamma=0.7).losses
    torch.testing.assert_close(found["simpo"], torch.full((2,), math.log1p(math.exp(0.7)), dtype=torch.float64))
    torch.testing.assert_close(found["orpo"], torch.full((2,), 0.2 * LN2, dtype=torch.float64))
    for name in ("nll", "mean_nll"):
        torch.testing.assert_close(found[name], torch.full((2,), 0.3, dtype=torch.float64))


def test_every_loss_has_a_value_in_closed_form() -> None:
    assert {name for names, _, _ in AT_REFERENCE.values() for name in names} | {"simpo", "orpo", "nll", "mean_nll"} == set(USUAL)


def test_equations() -> None:
    p, r, beta = logps(0), logps(1), 0.3
    assert p.corrupted is not None and r.corrupted is not None
    assert p.chosen_lengths is not None and p.rejected_lengths is not None
    w, ll, c = p.chosen - r.chosen, p.rejected - r.rejected, p.corrupted - r.corrupted
    found = preference_loss(p, r, loss_type=USUAL, beta=beta, anchor=0.1, label_smoothing=0.2, simpo_gamma=0.6, bco_shift=0.05)
    losses, margins = found.losses, beta * (w - ll)
    torch.testing.assert_close(losses["sigmoid"], softplus(-margins))
    torch.testing.assert_close(losses["hinge"], (1 - margins).clamp(min=0))
    torch.testing.assert_close(losses["cdpo"], 0.8 * softplus(-margins) + 0.2 * softplus(margins))
    torch.testing.assert_close(losses["robust"], (0.8 * softplus(-margins) - 0.2 * softplus(margins)) / 0.6)
    torch.testing.assert_close(losses["copo"], softplus(-beta * (w - c)))
    torch.testing.assert_close(losses["ancpo"], softplus(0.1 - beta * w))
    torch.testing.assert_close(losses["bco_pair"], softplus(0.05 - beta * w) + softplus(beta * ll - 0.05))
    torch.testing.assert_close(losses["nll"].mean(), -p.chosen.sum() / p.chosen_lengths.sum())
    torch.testing.assert_close(losses["mean_nll"], -p.chosen / p.chosen_lengths)
    per_token = w / p.chosen_lengths - ll / p.rejected_lengths
    torch.testing.assert_close(losses["ipo"], (per_token - 1 / (2 * beta)) ** 2)
    means = p.chosen / p.chosen_lengths, p.rejected / p.rejected_lengths
    torch.testing.assert_close(losses["simpo"], softplus(0.6 - beta * (means[0] - means[1])))
    odds = [mean.exp() / (1 - mean.exp()) for mean in means]
    torch.testing.assert_close(losses["orpo"], beta * softplus(-torch.log(odds[0] / odds[1])))
    torch.testing.assert_close(found.rewards["chosen"], beta * w)
    torch.testing.assert_close(found.margins, margins)
    torch.testing.assert_close(found.accuracies, (w > ll).double(), check_dtype=False)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_kto_measures_each_half_against_the_other(sign: float) -> None:
    """Batch means below 0 count as 0, and no gradient goes through them."""
    chosen = sign * torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)
    rejected = sign * torch.tensor([0.5, 1.5], dtype=torch.float64)
    found = preference_loss(SequenceLogps(chosen=chosen, rejected=rejected), loss_type=("kto_pair",), beta=0.5)
    z_chosen, z_rejected = (2.0, 1.0) if sign > 0 else (0.0, 0.0)
    terms = 1 - torch.sigmoid(0.5 * (chosen - z_rejected)), 1 - torch.sigmoid(0.5 * (z_chosen - rejected))
    torch.testing.assert_close(found.losses["kto_pair"], ((terms[0] + terms[1]) / 2).detach())
    own = torch.autograd.grad(terms[0].mean() / 2, chosen)
    torch.testing.assert_close(torch.autograd.grad(found.loss, chosen), own)


def test_anchors_hold_chosen_above_and_the_others_below() -> None:
    p, r = logps(0), logps(1)
    rewards = preference_loss(p, r, beta=0.3).rewards
    for name in ("chosen", "rejected", "corrupted"):
        found = preference_loss(p, r, loss_type=("ancpo",), beta=0.3, anchor=0.2, anchors=(name,)).losses["ancpo"]
        distance = (rewards[name] - 0.2) * (1 if name == "chosen" else -1)
        torch.testing.assert_close(found, softplus(-distance))
    both = preference_loss(p, r, loss_type=("ancpo",), beta=0.3, anchors=("chosen", "rejected")).loss
    each = [preference_loss(p, r, loss_type=("ancpo",), beta=0.3, anchors=(name,)).loss for name in ("chosen", "rejected")]
    torch.testing.assert_close(both, sum(each))


def test_length_normalised_divides_what_is_not_per_token_already() -> None:
    p, r = logps(0), logps(1)
    assert p.corrupted is not None and r.corrupted is not None
    assert p.chosen_lengths is not None and p.rejected_lengths is not None
    divided = [
        SequenceLogps(
            chosen=x.chosen / p.chosen_lengths,
            rejected=x.rejected / p.rejected_lengths,
            corrupted=None if x.corrupted is None else x.corrupted / p.chosen_lengths,
        )
        for x in (p, r)
    ]
    options: dict[str, Any] = {"beta": 0.3, "label_smoothing": 0.1}
    names = [name for name in USUAL if name not in NEEDS_LENGTHS]
    found = preference_loss(p, r, loss_type=names, length_normalised=True, **options)
    expected = preference_loss(*divided, loss_type=names, **options)
    for name in names:
        torch.testing.assert_close(found.losses[name], expected.losses[name])
    torch.testing.assert_close(found.rewards, expected.rewards)
    per_token = sorted(NEEDS_LENGTHS)
    plain, normalised = (preference_loss(p, r, loss_type=per_token, length_normalised=flag).losses for flag in (False, True))
    torch.testing.assert_close(plain, normalised)


@pytest.mark.parametrize("name", USUAL)
def test_gradients_of_every_loss(name: str) -> None:
    check_gradients((name,), None, label_smoothing=0.2 if name in ("cdpo", "robust") else 0.0)


@pytest.mark.parametrize("length_normalised", [False, True])
def test_gradients_of_a_weighted_list(length_normalised: bool) -> None:
    check_gradients(
        (*MDPO, "nll", "robust"), (1.0, 0.5, 2.0, 0.0, -0.3), label_smoothing=0.1, length_normalised=length_normalised
    )


def check_gradients(names: tuple[str, ...], weights: tuple[float, ...] | None, **options: Any) -> None:
    base, reference = logps(0), logps(1)
    assert base.corrupted is not None
    anchors = ("chosen", "rejected", "corrupted")

    def run(chosen: Tensor, rejected: Tensor, corrupted: Tensor) -> Tensor:
        policy = SequenceLogps(
            chosen=chosen,
            rejected=rejected,
            corrupted=corrupted,
            chosen_lengths=base.chosen_lengths,
            rejected_lengths=base.rejected_lengths,
        )
        return preference_loss(policy, reference, loss_type=names, loss_weights=weights, anchors=anchors, **options).loss

    leaves = tuple(leaf.requires_grad_() for leaf in (base.chosen, base.rejected, base.corrupted))
    if names == ("kto_pair",):
        # Its batch means are constants to autograd, not to finite differences; below 0 they are constant to both.
        leaves = tuple((leaf - 20).detach().requires_grad_() for leaf in leaves)
    assert torch.autograd.gradcheck(run, leaves)
    grads = torch.autograd.grad(run(*leaves), leaves, allow_unused=True)
    assert any(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_weights() -> None:
    policy, reference = logps(0), logps(1)
    names, weights = ("sigmoid", "nll", "ancpo", "copo"), (1.0, 0.5, 2.0, 0.0)
    single = [preference_loss(policy, reference, loss_type=(name,)).loss for name in names]
    found = preference_loss(policy, reference, loss_type=names, loss_weights=weights).loss
    torch.testing.assert_close(found, sum(w * s for w, s in zip(weights, single, strict=True)))


def test_reference_carries_no_gradient() -> None:
    policy, reference = logps(0), logps(1)
    policy.chosen.requires_grad_()
    reference.chosen.requires_grad_()
    preference_loss(policy, reference).loss.backward()
    assert policy.chosen.grad is not None
    assert reference.chosen.grad is None


@pytest.mark.parametrize("name", USUAL)
def test_reference_free_losses_are_those_that_ignore_the_reference(name: str) -> None:
    policy = logps(0)
    found = [preference_loss(policy, reference, loss_type=(name,)).loss for reference in (logps(1), logps(2))]
    assert (found[0] == found[1]).item() == (name in REFERENCE_FREE)


@pytest.mark.parametrize("name", USUAL)
def test_what_losses_need(name: str) -> None:
    bare = SequenceLogps(chosen=-torch.ones(2), rejected=-torch.ones(2))

    def refused(policy: SequenceLogps, message: str) -> bool:
        try:
            preference_loss(policy, policy, loss_type=(name,))
        except ValueError as error:
            assert message in str(error)
            return True
        return False

    if name in NEEDS_CORRUPTED:
        assert refused(bare, f"loss '{name}' needs log-probabilities under the corrupted picture")
    else:
        assert refused(bare, f"loss '{name}' needs policy.chosen_lengths") == (name in NEEDS_LENGTHS)


def test_odds_stay_finite_where_a_response_is_certain() -> None:
    """Mean log-probabilities that round to 0, and far below it."""
    chosen = torch.tensor([0.0, -1e-9, -300.0], requires_grad=True)
    policy = SequenceLogps(
        chosen=chosen, rejected=chosen.detach().flip(0), chosen_lengths=torch.ones(3), rejected_lengths=torch.ones(3)
    )
    found = preference_loss(policy, loss_type=("orpo",))
    found.loss.backward()
    assert chosen.grad is not None
    assert found.loss.isfinite() and chosen.grad.isfinite().all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": ("dpo",)}, "loss_type must name losses among .* got 'dpo'"),
        ({"loss_type": ()}, "got an empty list"),
        ({"loss_weights": (1.0, 2.0)}, "loss_weights must have one entry a loss"),
        ({"loss_type": ("copo",)}, "'copo' needs .* policy.corrupted is None"),
        ({"loss_type": ("ancpo",), "anchors": ("corrupted",)}, "'ancpo' needs .* policy.corrupted is None"),
        ({"anchors": ()}, "anchors must name one or more of chosen, rejected, corrupted"),
        ({"anchors": ("chosen", "chosen")}, "each once, got"),
        ({"anchors": ("winner",)}, r"got \['winner'\]"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"loss_type": ("cdpo",), "label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1 acts on cdpo, robust only, .* use 'cdpo'"),
        ({"simpo_gamma": -1.0}, "simpo_gamma must be 0 or more, got -1.0"),
        ({"anchor": math.nan}, "anchor must be a finite number, got nan"),
        ({"bco_shift": math.inf}, "bco_shift must be a finite number, got inf"),
        ({"length_normalised": True}, "length_normalised needs policy.chosen_lengths"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preference_loss(SequenceLogps(chosen=-torch.ones(6), rejected=-torch.ones(6)), **options)


def test_the_reference_must_have_the_branches_of_the_policy() -> None:
    with pytest.raises(ValueError, match="policy has 'corrupted' log-probabilities but reference.corrupted is None"):
        preference_loss(logps(0), logps(1, corrupted=False), loss_type=MDPO)


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


TOKENS = torch.tensor([-1.0, -2.0, -4.0, -0.5, -0.25, -3.0], dtype=torch.float64)


@pytest.mark.parametrize("as_lengths", [list, torch.tensor])
def test_sequence_logps_are_sums(as_lengths: Callable[[list[int]], Any]) -> None:
    assert sequence_logps(TOKENS, as_lengths([3, 0, 2, 1])).tolist() == [-7.0, 0.0, -0.75, -3.0]


def test_weighted_sequence_logps_are_those_of_ddpo() -> None:
    """(unchanged + gamma changed) / (|unchanged| + gamma |changed|), gamma = 5; tokens 1 and 3 are changed."""
    weights = torch.tensor([1, 5, 1, 5, 1, 1])
    found = sequence_logps(TOKENS, [3, 0, 3], weights=weights)
    expected = [(-1 - 4 + 5 * -2.0) / (2 + 5), 0.0, (-0.25 - 3 + 5 * -0.5) / (2 + 5)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    even = sequence_logps(TOKENS, [3, 3], weights=torch.full((6,), 2.0))
    torch.testing.assert_close(even, torch.stack([TOKENS[:3].mean(), TOKENS[3:].mean()]))


@pytest.mark.parametrize("weights", [None, torch.tensor([1, 5, 0, 5, 1, 1])])
def test_gradients_of_sequence_logps(weights: Tensor | None) -> None:
    tokens = TOKENS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sequence_logps(x, [3, 0, 3], weights=weights), (tokens,))


def test_sequence_logps_of_half_precision_and_of_nothing() -> None:
    half = torch.full((300,), -1.0, dtype=torch.bfloat16)
    assert sequence_logps(half, [300]).tolist() == [-300.0]
    assert sequence_logps(half, [300]).dtype == torch.float32
    assert sequence_logps(torch.empty(0), []).shape == (0,)


@pytest.mark.parametrize(
    "lengths, weights, message",
    [
        ([3, 2], None, r"lengths must be counts that sum to the 6 token_logps, got \[3, 2\]"),
        ([7, -1], None, "lengths must be counts"),
        ([6], torch.ones(5), r"weights must have shape \(6\)"),
        ([3, 3], torch.tensor([1.0, 1, 1, 0, 0, 0]), "not all 0, got .* for response 1"),
        ([6], torch.tensor([1.0, 1, 1, 1, 1, -1]), "weights must be 0 or more"),
        ([6], torch.tensor([1.0, 1, 1, 1, 1, math.nan]), "weights must be 0 or more"),
    ],
)
def test_sequence_logps_that_do_not_fit(lengths: list[int], weights: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sequence_logps(TOKENS, lengths, weights=weights)


def triples(**fields: Any) -> TokenLogps:
    """Two records of three responses."""
    return replace(TokenLogps(logps=TOKENS, lengths=torch.tensor([[1, 2, 0], [1, 1, 1]]), branches=BRANCHES), **fields)


def test_tokens_count_as_their_sums_and_means_do() -> None:
    for weights in (None, torch.tensor([1, 5, 2, 5, 1, 1])):
        tokens = triples(weights=weights)
        values = sequence_logps(TOKENS, [1, 2, 0, 1, 1, 1], weights=weights).view(2, 3)
        sums = SequenceLogps(**dict(zip(BRANCHES, values.unbind(1), strict=True)))
        found, expected = (preference_loss(policy, loss_type=MDPO) for policy in (tokens, sums))
        torch.testing.assert_close(found.loss, expected.loss)
        torch.testing.assert_close(found.logps, dict(zip(BRANCHES, values.unbind(1), strict=True)))
        torch.testing.assert_close(found.rewards, expected.rewards)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"logps": TOKENS[None]}, r"policy.logps must have shape \(B\), got \(1, 6\)"),
        ({"lengths": torch.tensor([3, 3])}, r"policy.lengths must have shape \(B, 3\)"),
        ({"lengths": torch.ones(2, 3)}, "policy.lengths must be an integer tensor"),
        ({"lengths": torch.tensor([[1, 2, 0], [1, 1, 2]])}, "lengths must be counts that sum to the 6"),
        ({"lengths": torch.tensor([[1, 3, -1], [1, 1, 1]])}, "lengths must be counts that sum to the 6"),
        ({"branches": BRANCHES[:2], "lengths": torch.tensor([[3, 3]])}, "'copo' needs .* policy.branches are"),
        ({"branches": ("chosen", "rejected", "rejected")}, "policy.branches must be 'chosen', 'rejected' and maybe 'corrupted'"),
        ({"weights": torch.ones(5)}, r"policy.weights must have shape \(6\)"),
        ({"weights": torch.tensor([1.0, 0, 0, 1, 1, 1])}, "weights must be 0 or more and not all 0.* response 1"),
        ({"weights": torch.tensor([1.0, -1, 3, 1, 1, 1])}, "weights must be 0 or more"),
        ({"weights": torch.tensor([1.0, math.inf, 3, 1, 1, 1])}, "weights must be 0 or more"),
    ],
)
def test_tokens_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        preference_loss(triples(**fields), loss_type=MDPO)


@pytest.mark.parametrize(
    "reference, message",
    [
        (triples(logps=TOKENS[:5]), r"reference.logps must have shape \(6\)"),
        (triples(lengths=torch.tensor([[2, 1, 0], [1, 1, 1]])), "reference.lengths must be policy.lengths"),
        (triples(branches=("rejected", "chosen", "corrupted")), "reference.branches must be the policy's"),
        (triples(weights=torch.ones(6)), "reference has weights but policy.weights is None"),
        (SequenceLogps(chosen=TOKENS[:2], rejected=TOKENS[:2]), "policy has 'corrupted' log-probabilities but reference"),
        (SequenceLogps(chosen=TOKENS[:3], rejected=TOKENS[:2]), r"reference.chosen must have shape \(2\)"),
        (TOKENS, "reference must be TokenLogps, SequenceLogps or None, got Tensor"),
    ],
)
def test_references_that_do_not_fit_tokens(reference: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        preference_loss(triples(), reference)


def test_sums_take_sums_as_reference() -> None:
    with pytest.raises(TypeError, match="reference must be SequenceLogps"):
        preference_loss(logps(0), triples())
    with pytest.raises(TypeError, match="policy must be SequenceLogps or TokenLogps, got Tensor"):
        preference_loss(TOKENS)  # type: ignore[arg-type]
