"""Losses that look at more than a pair and a corrupted picture: SymMPO, a second rejected response, several corrupted views, MPO's group."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmdpo_kernels import TokenLogps, preference_loss
from mmdpo_kernels.backends.registry import load

LN2 = math.log(2)
NAMES = ("chosen", "rejected", "corrupted", "corrupted_2", "hallucinated", "similar_chosen", "similar_rejected", "exchanged")
SYM_MPO = ("sigmoid", "symmetric", "ancpo", "similar_anchor", "symmetric_margin")
BACKENDS = [
    name for name in ("reference", "native") if load("preference_loss", name).unavailable_reason("cpu", torch.float64) is None
]


def sums(seed: int, records: int = 4) -> Tensor:
    """(B, K) log-probabilities of responses."""
    generator = torch.Generator().manual_seed(seed)
    return -6 * torch.rand(records, len(NAMES), dtype=torch.float64, generator=generator) - 0.1


def given(values: Tensor) -> TokenLogps:
    """Each response a single token."""
    return TokenLogps(logps=values.flatten(), lengths=torch.ones(values.shape, dtype=torch.int64), branches=NAMES)


def ratios(policy: Tensor, reference: Tensor) -> dict[str, Tensor]:
    return dict(zip(NAMES, (policy - reference).unbind(1), strict=True))


def sym_mpo(policy: Tensor, reference: Tensor, beta: float, beta_2: float, lamda: float) -> Tensor:
    """SymMPO's released loss written out: two answers under two pictures, and one rejected answer; log-probabilities (B,)."""
    p, r = (dict(zip(NAMES, each.unbind(1), strict=True)) for each in (policy, reference))

    def gap(up: str, down: str) -> Tensor:
        return (p[up] - p[down]) - (r[up] - r[down])

    here, there = gap("chosen", "exchanged"), gap("similar_chosen", "similar_rejected")
    found = -logsigmoid(beta * gap("chosen", "rejected"))
    found = found + lamda * (-logsigmoid(beta * here) - logsigmoid(beta * there))
    found = found - logsigmoid(beta * (p["chosen"] - r["chosen"]))
    found = found - logsigmoid(beta_2 * (p["similar_chosen"] - r["similar_chosen"]))
    return found + 0.0001 * (here - there) ** 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_sym_mpo_is_the_released_loss(backend: str) -> None:
    policy, reference = sums(0).requires_grad_(), sums(1)
    options: dict[str, Any] = {"loss_type": SYM_MPO, "loss_weights": (1, 0.5, 1, 1, 1e-4), "similar_beta": 0.3}
    found = preference_loss(given(policy), given(reference), beta=0.2, backend=backend, **options).loss
    expected = sym_mpo(policy, reference, 0.2, 0.3, 0.5).mean()
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(each, policy)[0] for each in (found, expected)), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_rejected_response_shares_the_loss(backend: str) -> None:
    policy, reference = sums(0).requires_grad_(), sums(1)
    w, first, second = (ratios(policy, reference)[name] for name in ("chosen", "rejected", "hallucinated"))
    beta, share = 0.2, 0.3
    expected = {
        "sigmoid": -(1 - share) * logsigmoid(beta * (w - first)) - share * logsigmoid(beta * (w - second)),
        "hinge": (1 - share) * (1 - beta * (w - first)).clamp(min=0) + share * (1 - beta * (w - second)).clamp(min=0),
        "ipo": (1 - share) * (w - first - 1 / (2 * beta)) ** 2 + share * (w - second - 1 / (2 * beta)) ** 2,
    }
    options: dict[str, Any] = {"extra_negative": "hallucinated", "extra_negative_weight": share, "beta": beta, "backend": backend}
    for name, value in expected.items():
        found = preference_loss(given(policy), given(reference), loss_type=name, **options)
        torch.testing.assert_close(found.losses[name], value.detach(), rtol=1e-12, atol=0)
        both = (torch.autograd.grad(each, policy, retain_graph=True)[0] for each in (found.loss, value.mean()))
        torch.testing.assert_close(*both, rtol=1e-12, atol=1e-15)
    # With the whole weight on one of them it is the loss of a pair.
    alone = preference_loss(given(policy), given(reference), beta=beta, backend=backend).loss
    kept = preference_loss(given(policy), given(reference), **{**options, "extra_negative_weight": 0.0}).loss
    torch.testing.assert_close(kept, alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_corrupted_views_are_averaged(backend: str) -> None:
    policy, reference = sums(0), sums(1)
    found = ratios(policy, reference)
    w, views, beta = found["chosen"], [found["corrupted"], found["corrupted_2"]], 0.2
    options: dict[str, Any] = {"corrupted": ("corrupted", "corrupted_2"), "beta": beta, "backend": backend}
    losses = preference_loss(given(policy), given(reference), loss_type=("copo",), **options).losses
    torch.testing.assert_close(losses["copo"], -sum(logsigmoid(beta * (w - each)) for each in views) / 2)  # type: ignore[arg-type]
    options |= {"anchors": ("chosen", "corrupted"), "anchor": 0.1}
    losses = preference_loss(given(policy), given(reference), loss_type=("ancpo",), **options).losses
    below = -sum(logsigmoid(0.1 - beta * each) for each in views) / 2  # type: ignore[arg-type]
    torch.testing.assert_close(losses["ancpo"], below - logsigmoid(beta * w - 0.1))


AT_REFERENCE: dict[str, tuple[dict[str, Any], float]] = {
    "symmetric": ({"loss_type": "symmetric"}, 2 * LN2),
    "symmetric_margin": ({"loss_type": "symmetric_margin"}, 0.0),
    "similar_anchor": ({"loss_type": "similar_anchor", "similar_beta": 0.7}, LN2),
    "sym_mpo": ({"loss_type": SYM_MPO, "loss_weights": (1, 0.5, 1, 1, 1e-4)}, 4 * LN2),
    "copo": ({"loss_type": "copo", "corrupted": ("corrupted", "corrupted_2")}, LN2),
    "sigmoid": ({"loss_type": "sigmoid", "extra_negative": "hallucinated"}, LN2),
    "hinge": ({"loss_type": "hinge", "extra_negative": "hallucinated"}, 1.0),
    "ipo": ({"loss_type": "ipo", "extra_negative": "hallucinated"}, 1 / (4 * 0.2**2)),
}


@pytest.mark.parametrize("case", AT_REFERENCE)
def test_value_at_the_reference(case: str) -> None:
    options, value = AT_REFERENCE[case]
    policy = given(sums(0))
    assert preference_loss(policy, policy, beta=0.2, **options).loss.item() == pytest.approx(value, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"loss_type": "copo", "extra_negative": "hallucinated"},
            "extra_negative='hallucinated' acts on hinge, ipo, sigmoid only",
        ),
        ({"extra_negative": "rejected"}, "must name a branch other than chosen and rejected"),
        ({"extra_negative": "hallucinated", "extra_negative_weight": 1.5}, r"extra_negative_weight must be in \[0, 1\], got 1.5"),
        ({"extra_negative": "unheard_of"}, "'sigmoid' needs log-probabilities of the branch 'unheard_of'"),
        ({"corrupted": ()}, "corrupted must name one or more branches"),
        ({"similar_beta": 0.0}, "similar_beta must be above 0, or None for beta, got 0.0"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preference_loss(given(sums(0)), **options)
