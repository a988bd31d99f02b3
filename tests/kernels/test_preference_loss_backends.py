"""Fused backends of preference_loss: values, metrics and gradients against the reference in float64, from sums and from tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from mmdpo_kernels import PreferenceLoss, SequenceLogps, TokenLogps, preference_loss, sequence_logps
from mmdpo_kernels.backends.registry import load
from mmdpo_kernels.losses import LOSSES, values_of

ALL = ("chosen", "rejected", "corrupted")
USUAL = tuple(name for name in LOSSES if {value.branch for value in values_of(name)} <= set(ALL))
SIX = (*ALL, "similar_chosen", "similar_rejected", "exchanged")
MDPO = ("sigmoid", "copo", "ancpo")
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": (name,)} for name in USUAL if name not in ("cdpo", "robust")},
    "cdpo": {"loss_type": ("cdpo",), "label_smoothing": 0.2},
    "robust": {"loss_type": ("robust",), "label_smoothing": 0.2},
    "mdpo": {"loss_type": MDPO},
    "weighted": {"loss_type": (*MDPO, "nll"), "loss_weights": (1.0, 0.5, -0.3, 0.0)},
    "named twice": {"loss_type": ("sigmoid", "hinge", "sigmoid"), "loss_weights": (1.0, 2.0, 0.5)},
    "all anchors": {"loss_type": ("ancpo",), "anchors": ALL, "anchor": 0.3},
    "low anchors": {"loss_type": ("ancpo", "sigmoid"), "anchors": ("corrupted", "rejected"), "anchor": -0.3},
    "shifted": {"loss_type": ("bco_pair", "simpo"), "bco_shift": 0.7, "simpo_gamma": 1.5},
    "all": {"loss_type": USUAL, "label_smoothing": 0.1, "anchors": ALL, "length_normalised": True},
    "all, not normalised": {"loss_type": USUAL, "label_smoothing": 0.1},
}


def backends(dtype: torch.dtype) -> list[str]:
    """Those that can be run here, interpreted or not."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [name for name in ("native", "triton") if load("preference_loss", name).unavailable_reason(device, dtype) is None]


RUNS = [(backend, dtype) for dtype in (torch.float32, torch.float64) for backend in backends(dtype)]
DEVICE = "cuda" if torch.cuda.is_available() and all(backend == "triton" for backend, _ in RUNS) else "cpu"


@pytest.fixture(params=RUNS, ids=lambda run: f"{run[0]}-{str(run[1]).removeprefix('torch.')}")
def run(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    found: tuple[str, torch.dtype] = request.param
    return found


def tokens(
    dtype: torch.dtype, *, records: int = 5, branches: tuple[str, ...] = ALL, weighted: bool = False, longest: int = 9
) -> TokenLogps:
    lengths = torch.randint(1, longest + 1, (records, len(branches)))
    count = int(lengths.sum())
    return TokenLogps(
        logps=(-3 * torch.rand(count, dtype=dtype) - 0.02).to(DEVICE),
        lengths=lengths.to(DEVICE),
        branches=branches,
        weights=torch.randint(1, 6, (count,)).to(DEVICE) if weighted else None,
    )


def sums(given: TokenLogps) -> SequenceLogps:
    values = sequence_logps(given.logps, given.lengths.flatten(), weights=given.weights).view(given.lengths.shape)
    columns = {name: column for column, name in enumerate(given.branches)}
    return SequenceLogps(
        **{name: values[:, column] for name, column in columns.items()},
        **{f"{name}_lengths": given.lengths[:, column] for name, column in columns.items()},
    )


def another(given: TokenLogps) -> TokenLogps:
    return replace(given, logps=given.logps - 0.5 * torch.randn_like(given.logps))


def graded(policy: Tensor, outcome: PreferenceLoss) -> tuple[PreferenceLoss, Tensor]:
    (grad,) = torch.autograd.grad(outcome.loss, policy)
    return outcome, grad


def check(
    policy: TokenLogps, reference: Any, true_reference: Any, backend: str, *, as_sums: bool = False, **options: Any
) -> None:
    """The backend against the reference backend on the same numbers in float64."""
    leaf = policy.logps.clone().requires_grad_()
    wide = policy.logps.double().requires_grad_()
    given, exact = replace(policy, logps=leaf), replace(policy, logps=wide)
    form: Any = sums if as_sums else lambda tokens: tokens
    found, grad = graded(leaf, preference_loss(form(given), reference, backend=backend, **options))
    true, true_grad = graded(wide, preference_loss(form(exact), true_reference, backend="reference", **options))
    assert found.loss.dtype == leaf.dtype and grad.dtype == leaf.dtype
    # The losses of log-odds and of sums near one another are differences of larger numbers.
    near: dict[str, Any] = {"rtol": 3e-6, "atol": 3e-6} if leaf.dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    near["check_dtype"] = False
    torch.testing.assert_close(found.loss, true.loss, **near)
    torch.testing.assert_close(found.table, true.table, **near)
    assert list(found.losses) == list(true.losses) and list(found.rewards) == list(true.rewards)
    torch.testing.assert_close(grad, true_grad, **near)


@pytest.mark.parametrize("case", OPTIONS)
def test_tokens(run: tuple[str, torch.dtype], case: str) -> None:
    backend, dtype = run
    policy = tokens(dtype)
    reference = another(policy)
    check(policy, reference, replace(reference, logps=reference.logps.double()), backend, beta=0.3, **OPTIONS[case])


@pytest.mark.parametrize("case", OPTIONS)
def test_sums(run: tuple[str, torch.dtype], case: str) -> None:
    backend, dtype = run
    policy = tokens(dtype)
    reference = sums(replace(another(policy), logps=another(policy).logps.double()))
    check(policy, reference, reference, backend, as_sums=True, beta=0.3, **OPTIONS[case])


@pytest.mark.parametrize(
    "options",
    [
        {
            "loss_type": ("sigmoid", "symmetric", "ancpo", "similar_anchor", "symmetric_margin"),
            "loss_weights": (1, 0.5, 1, 1, 1e-4),
        },
        {"loss_type": ("sigmoid", "hinge", "ipo"), "extra_negative": "exchanged", "extra_negative_weight": 0.3},
        {"loss_type": ("copo", "ancpo"), "corrupted": ("corrupted", "similar_rejected"), "anchors": ("corrupted", "chosen")},
        {"loss_type": ("sigmoid", "bco_pair", "mean_nll"), "loss_weights": (0.8, 0.2, 1.0), "bco_shift": -0.3},
    ],
)
def test_losses_of_further_branches(run: tuple[str, torch.dtype], options: dict[str, Any]) -> None:
    backend, dtype = run
    policy = tokens(dtype, records=19, branches=SIX, longest=3)
    reference = another(policy)
    check(policy, reference, replace(reference, logps=reference.logps.double()), backend, beta=0.3, **options)


@pytest.mark.parametrize("branches", [ALL, ALL[:2], ("corrupted", "rejected", "chosen"), ("rejected", "chosen")])
@pytest.mark.parametrize("cached", [False, True])
def test_branches_in_any_order_and_cached_sums(run: tuple[str, torch.dtype], branches: tuple[str, ...], cached: bool) -> None:
    backend, dtype = run
    policy = tokens(dtype, branches=branches)
    reference = another(policy)
    exact = replace(reference, logps=reference.logps.double())
    given, true = (sums(reference), sums(exact)) if cached else (reference, exact)
    names = MDPO if "corrupted" in branches else ("sigmoid", "nll", "kto_pair")
    check(policy, given, true, backend, loss_type=names)


@pytest.mark.parametrize("records", [1, 70])
def test_weighted_means_of_batches_of_any_size(run: tuple[str, torch.dtype], records: int) -> None:
    """More records than a tile holds, longer than one."""
    backend, dtype = run
    policy = tokens(dtype, records=records, weighted=True, longest=130)
    reference = another(policy)
    exact = replace(reference, logps=reference.logps.double())
    check(policy, reference, exact, backend, beta=2.0, loss_type=(*MDPO, "kto_pair"))
    check(replace(policy, weights=None), None, None, backend, beta=0.02, loss_type=("nll", "sigmoid", "kto_pair"))


def test_tokens_and_their_sums_are_one_call(run: tuple[str, torch.dtype]) -> None:
    backend, dtype = run
    policy = tokens(dtype)
    found = preference_loss(policy, another(policy), loss_type=MDPO, backend=backend)
    assert set(found.logps) == set(ALL)
    torch.testing.assert_close(found.logps["chosen"], sums(policy).chosen, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.accuracies, (found.rewards["chosen"] > found.rewards["rejected"]).to(dtype))
    torch.testing.assert_close(found.margins, found.rewards["chosen"] - found.rewards["rejected"], rtol=1e-5, atol=1e-6)


def test_a_response_without_tokens_and_a_batch_without_records(run: tuple[str, torch.dtype]) -> None:
    backend, dtype = run
    policy = TokenLogps(
        logps=torch.tensor([-1.0, -2.0], dtype=dtype, device=DEVICE, requires_grad=True),
        lengths=torch.tensor([[2, 0]], device=DEVICE),
    )
    outcome, grad = graded(policy.logps, preference_loss(policy, backend=backend))
    assert outcome.logps["chosen"].tolist() == [-3.0] and outcome.logps["rejected"].tolist() == [0.0]
    assert outcome.loss.item() == pytest.approx(math.log1p(math.exp(0.3)), rel=1e-6)
    assert grad[0] == grad[1] < 0
    nothing = TokenLogps(
        logps=torch.empty(0, dtype=dtype, device=DEVICE), lengths=torch.empty(0, 2, dtype=torch.int64, device=DEVICE)
    )
    assert preference_loss(nothing, backend=backend).loss.isnan()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["policy", "reference"])
@pytest.mark.parametrize("branch", ALL)
@pytest.mark.parametrize("name", ["sigmoid", "hinge", "kto_pair", "orpo", "nll", "copo"])
def test_what_is_not_finite_shows(value: float, place: str, branch: str, name: str) -> None:
    for backend in ("reference", *backends(torch.float32)):
        policy = tokens(torch.float32, records=2, longest=2)
        reference = another(policy)
        spoilt = (policy if place == "policy" else reference).logps
        column = ALL.index(branch)
        spoilt[int(policy.lengths.flatten()[: 3 + column].sum())] = value
        assert not preference_loss(policy, reference, loss_type=(name,), backend=backend).loss.isfinite(), backend


def test_rewards_far_apart_keep_their_digits(run: tuple[str, torch.dtype]) -> None:
    """Losses and gradients near 0 have full relative accuracy: nothing cancels."""
    backend, dtype = run
    margins = torch.tensor([0.0, 1e-4, 0.3, 2.0, 11.0, 25.0, 60.0, 95.0], dtype=dtype, device=DEVICE)
    for sign in (1, -1):
        chosen = (sign * margins).requires_grad_()
        zeros = torch.zeros_like(margins)
        given = SequenceLogps(chosen=chosen, rejected=zeros)
        outcome, grad = graded(chosen, preference_loss(given, beta=1.0, backend=backend))
        wide = chosen.detach().double().requires_grad_()
        true, true_grad = graded(wide, preference_loss(SequenceLogps(chosen=wide, rejected=zeros), beta=1.0, backend="reference"))
        rtol = 4e-7 if dtype == torch.float32 else 1e-14
        keep = slice(None) if dtype == torch.float64 else slice(0, 7)  # e^-95 is no ordinary float32
        torch.testing.assert_close(outcome.losses["sigmoid"][keep].double(), true.losses["sigmoid"][keep], rtol=rtol, atol=0)
        torch.testing.assert_close(grad[keep].double(), true_grad[keep], rtol=rtol, atol=0)


def test_odds_of_certain_and_of_impossible_responses(run: tuple[str, torch.dtype]) -> None:
    backend, dtype = run
    means = torch.tensor([0.0, -1e-9, -1e-5, -0.1, -0.49, -0.51, -0.7, -3.0, -40.0, -300.0], dtype=dtype, device=DEVICE)
    ones = torch.ones_like(means)
    chosen = means.clone().requires_grad_()
    given = SequenceLogps(chosen=chosen, rejected=-ones, chosen_lengths=ones, rejected_lengths=ones)
    outcome, grad = graded(chosen, preference_loss(given, loss_type=("orpo",), backend=backend))
    clean = means.clone().requires_grad_()
    true, true_grad = graded(clean, preference_loss(replace(given, chosen=clean), loss_type=("orpo",), backend="reference"))
    near: dict[str, Any] = {"rtol": 2e-6, "atol": 0.0} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 0.0}
    torch.testing.assert_close(outcome.losses["orpo"], true.losses["orpo"], **near)
    torch.testing.assert_close(grad, true_grad, **near)


def test_half_precision_is_widened_and_gets_its_gradient_back(run: tuple[str, torch.dtype]) -> None:
    backend, dtype = run
    policy = tokens(torch.bfloat16)
    leaf = policy.logps.requires_grad_()
    outcome, grad = graded(leaf, preference_loss(policy, loss_type=MDPO, backend=backend))
    assert outcome.loss.dtype == outcome.table.dtype == torch.float32 and grad.dtype == torch.bfloat16
    true, _ = graded(leaf, preference_loss(policy, loss_type=MDPO, backend="reference"))
    torch.testing.assert_close(outcome.table, true.table, rtol=1e-5, atol=1e-6)


def test_layouts_do_not_matter(run: tuple[str, torch.dtype]) -> None:
    backend, dtype = run
    policy = tokens(dtype, weighted=True)
    plain = preference_loss(policy, policy, loss_type=MDPO, backend=backend).table
    assert policy.weights is not None
    strided = TokenLogps(
        logps=policy.logps.repeat_interleave(2)[::2],
        lengths=policy.lengths.to(torch.int32).T.contiguous().T,
        branches=ALL,
        weights=policy.weights.double().repeat_interleave(2)[::2],
    )
    assert torch.equal(preference_loss(strided, strided, loss_type=MDPO, backend=backend).table, plain)


def test_the_gradient_is_scaled_by_what_comes_from_above(run: tuple[str, torch.dtype]) -> None:
    backend, dtype = run
    policy = tokens(dtype)
    policy.logps.requires_grad_()
    first, second = (preference_loss(policy, loss_type=(name,), backend=backend).loss for name in ("sigmoid", "nll"))
    expected = sum(
        factor * torch.autograd.grad(loss, policy.logps, retain_graph=True)[0] for factor, loss in ((2.0, first), (3.0, second))
    )
    (2 * first + 3 * second).backward()
    torch.testing.assert_close(policy.logps.grad, expected)
    with torch.no_grad():
        assert not preference_loss(policy, backend=backend).loss.requires_grad


def test_a_second_derivative_is_refused_where_there_is_none(run: tuple[str, torch.dtype]) -> None:
    backend, dtype = run
    policy = tokens(dtype)
    policy.logps.requires_grad_()
    with pytest.raises(RuntimeError, match="only the backend 'reference' has a second derivative"):
        torch.autograd.grad(preference_loss(policy, backend=backend).loss ** 2, policy.logps, create_graph=True)
    loss = preference_loss(policy, backend="reference").loss
    (grad,) = torch.autograd.grad(loss, policy.logps, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), policy.logps)
    assert second.abs().sum() > 0


def test_autocast_leaves_the_loss_alone(run: tuple[str, torch.dtype]) -> None:
    backend, dtype = run
    policy = tokens(dtype)
    policy.logps.requires_grad_()
    plain, plain_grad = graded(policy.logps, preference_loss(policy, backend=backend))
    with torch.autocast(DEVICE, torch.bfloat16):
        found, grad = graded(policy.logps, preference_loss(policy, backend=backend))
    assert torch.equal(found.loss, plain.loss) and torch.equal(grad, plain_grad)


def test_compiled_without_a_graph_break() -> None:
    """`torch.compile` sees an operator, whatever the batch."""

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(logps: Tensor, reference: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        policy = TokenLogps(logps=logps, lengths=lengths, branches=ALL)
        outcome = preference_loss(policy, replace(policy, logps=reference), loss_type=MDPO)
        return outcome.loss, outcome.rewards["chosen"]

    for records in (3, 5):
        policy = tokens(torch.float32, records=records)
        other = another(policy)
        leaf = policy.logps.clone().requires_grad_()
        loss, rewards = step(leaf, other.logps, policy.lengths)
        (grad,) = torch.autograd.grad(loss, leaf)
        plain = policy.logps.clone().requires_grad_()
        true, true_grad = graded(plain, preference_loss(replace(policy, logps=plain), other, loss_type=MDPO))
        torch.testing.assert_close(loss, true.loss)
        torch.testing.assert_close(rewards, true.rewards["chosen"])
        torch.testing.assert_close(grad, true_grad)


def test_saved_tensors_may_be_moved_away() -> None:
    """Activation offload copies what backward needs as soon as an operation is done."""
    tokens = (-torch.rand(6)).requires_grad_()
    policy = TokenLogps(logps=tokens, lengths=torch.tensor([[2, 1], [1, 2]]))
    expected = torch.autograd.grad(preference_loss(policy, backend="reference").loss, tokens)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda kept: kept):
        found = preference_loss(policy, backend=RUNS[0][0]).loss
    torch.testing.assert_close(torch.autograd.grad(found, tokens), expected)


def test_checkpointed() -> None:
    """Recomputation stops at the last tensor that it needs, which is after the kernel."""
    tokens = (-torch.rand(6)).requires_grad_()

    def loss(logps: Tensor) -> Tensor:
        policy = TokenLogps(logps=logps * 2, lengths=torch.tensor([[2, 1], [1, 2]]))
        return preference_loss(policy, backend=RUNS[0][0]).loss * 3

    expected = torch.autograd.grad(loss(tokens), tokens)
    found = torch.utils.checkpoint.checkpoint(loss, tokens, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(found, tokens), expected)


def test_settings_in_tensors_are_read_at_each_call() -> None:
    beta = torch.tensor(0.1)
    policy = TokenLogps(logps=-torch.rand(6), lengths=torch.tensor([[2, 1], [1, 2]]))
    before = preference_loss(policy, beta=beta).loss  # type: ignore[arg-type]
    beta.fill_(1.0)
    assert preference_loss(policy, beta=beta).loss != before  # type: ignore[arg-type]


def test_no_records_for_some_tokens() -> None:
    with pytest.raises(ValueError, match="policy.lengths has no records for the 6 tokens"):
        preference_loss(TokenLogps(logps=-torch.rand(6), lengths=torch.zeros(0, 2, dtype=torch.int64)))
