"""A loss is one row of a table: one that nobody has heard of goes through every backend and the trainer, and looks at any branches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus
from training_cases import config, preference_records, tiny

from mmdpo_kernels import SequenceLogps, TokenLogps, preference_loss
from mmdpo_kernels.backends.native.extension import load as load_native
from mmdpo_kernels.backends.registry import load
from mmdpo_kernels.loss_terms import LINKS, VALUES, Term, Value
from mmdpo_kernels.losses import EXTENDED, LOSSES, NEEDS_CORRUPTED, NEEDS_LENGTHS, REFERENCE_FREE, SMOOTHED, LossParameters
from mmdpo_trainers.training.config import PreferenceConfig
from mmdpo_trainers.training.trainer import PreferenceTrainer

PAIR = ("chosen", "rejected")
FIVE = ("chosen", "rejected", "other", "corrupted", "other_rejected")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def made_up(x: LossParameters) -> Iterable[Term]:
    """Every link, and every value of a branch."""
    yield Term("square", (Value("ratio", "chosen"), Value("mean_logp", "rejected", -0.5)), scale=x.beta, offset=0.2, weight=0.3)
    yield Term("sigmoid", (Value("log_odds", "chosen"), Value("logp", "rejected", 0.1)), weight=1.5)
    yield Term("hinge", (Value("mean_ratio", "rejected", 2.0), Value("batch_ratio", "chosen", -1.0)))
    yield Term("minus_log_sigmoid", (Value("batch_logp", "chosen"), Value("batch_logp", "rejected", -2.0)), weight=-0.7)
    yield Term("identity", (Value("logp", "chosen", -0.01),), scale=x.beta)


def made_up_value(policy: list[Tensor], reference: list[Tensor], counts: list[Tensor], beta: float) -> Tensor:
    """The same written out; (B,)."""
    (w, lose), (w_ratio, lose_ratio) = policy, (p - r for p, r in zip(policy, reference, strict=True))
    odds = w / counts[0] - torch.log1p(-(w / counts[0]).exp())
    means = w.sum() / counts[0].sum() - 2 * lose.sum() / counts[1].sum()
    return (
        0.3 * (beta * (w_ratio - 0.5 * lose / counts[1]) + 0.2) ** 2
        + 1.5 * torch.sigmoid(odds + 0.1 * lose)
        + (1 - (2 * lose_ratio / counts[1] - w_ratio.detach().mean().clamp(min=0))).clamp(min=0)
        - 0.7 * softplus(-means)
        - 0.01 * beta * w
    )


def two_pictures(x: LossParameters) -> Iterable[Term]:
    """After SymMPO (arXiv 2506.11712): another picture with its own answers, and the squared difference of both margins."""
    for up, down in (PAIR, ("other", "other_rejected"), ("chosen", "corrupted")):
        yield Term("minus_log_sigmoid", (Value("ratio", up), Value("ratio", down, -1.0)), scale=x.beta)
    signs = (("chosen", 1.0), ("rejected", -1.0), ("other", -1.0), ("other_rejected", 1.0))
    yield Term("square", tuple(Value("ratio", branch, sign) for branch, sign in signs), weight=1e-2)


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row each, and nothing else."""
    monkeypatch.setitem(LOSSES, "made_up", made_up)
    monkeypatch.setitem(LOSSES, "two_pictures", two_pictures)


def tokens(branches: tuple[str, ...], dtype: torch.dtype, records: int = 5, shift: float = 0.0) -> tuple[TokenLogps, TokenLogps]:
    """Policy and reference, the policy's chosen responses likelier than the reference's by `shift` a token."""
    lengths = torch.randint(1, 8, (records, len(branches)))
    logps = -3 * torch.rand(int(lengths.sum()), dtype=torch.float64) - 0.05
    other = logps - shift + 0.3 * torch.randn_like(logps)
    policy, reference = (
        TokenLogps(logps=values.to(DEVICE, dtype), lengths=lengths.to(DEVICE), branches=branches) for values in (logps, other)
    )
    policy.logps.requires_grad_()
    return policy, reference


def backends(dtype: torch.dtype) -> list[str]:
    return [name for name in ("native", "triton") if load("preference_loss", name).unavailable_reason(DEVICE, dtype) is None]


RUNS = [(backend, dtype) for dtype in (torch.float32, torch.float64) for backend in backends(dtype)]


def test_the_reference_is_the_equation_and_its_gradient() -> None:
    policy, reference = tokens(PAIR, torch.float64, shift=-1.0)  # mean ratios below 0: constant to finite differences too
    pieces = [values.detach().cpu().split(policy.lengths.flatten().tolist()) for values in (policy.logps, reference.logps)]
    mine, theirs = ([torch.stack([piece.sum() for piece in each[k::2]]) for k in (0, 1)] for each in pieces)
    found = preference_loss(policy, reference, loss_type="made_up", beta=0.3, backend="reference")
    expected = made_up_value(mine, theirs, list(policy.lengths.cpu().T.double()), 0.3)
    torch.testing.assert_close(found.losses["made_up"].cpu(), expected)
    torch.testing.assert_close(found.loss.cpu(), expected.mean())

    def run(logps: Tensor) -> Tensor:
        given = replace(policy, logps=logps)
        return preference_loss(given, reference, loss_type=("made_up", "nll"), loss_weights=(0.6, 2.0), backend="reference").loss

    assert torch.autograd.gradcheck(run, (policy.logps,))


@pytest.mark.parametrize("names, branches", [(("made_up",), PAIR), (("two_pictures", "sigmoid", "made_up"), FIVE)])
@pytest.mark.parametrize("length_normalised", [False, True])
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_backends_agree(
    run: tuple[str, torch.dtype], length_normalised: bool, names: tuple[str, ...], branches: tuple[str, ...]
) -> None:
    """More records than a tile holds, as many branches as there are names."""
    backend, dtype = run
    policy, reference = tokens(branches, dtype, records=19, shift=0.3)
    options: dict[str, Any] = {"loss_type": names, "beta": 0.3, "length_normalised": length_normalised}
    exact = replace(policy, logps=policy.logps.detach().double().requires_grad_())
    found = preference_loss(policy, reference, backend=backend, **options)
    true = preference_loss(exact, replace(reference, logps=reference.logps.double()), backend="reference", **options)
    near: dict[str, Any] = {"rtol": 3e-6, "atol": 3e-6} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(found.loss, true.loss, check_dtype=False, **near)
    torch.testing.assert_close(found.table, true.table, check_dtype=False, **near)
    assert tuple(found.rewards) == branches
    gradients = [torch.autograd.grad(each.loss, of.logps)[0] for each, of in ((found, policy), (true, exact))]
    torch.testing.assert_close(*gradients, check_dtype=False, **near)


def test_what_a_loss_needs_is_read_off_its_terms() -> None:
    assert set(REFERENCE_FREE) == {"nll", "mean_nll", "simpo", "orpo"}
    assert set(NEEDS_CORRUPTED) == {"copo", "two_pictures"}
    assert set(NEEDS_LENGTHS) == {"ipo", "simpo", "orpo", "nll", "mean_nll", "made_up"}
    assert set(EXTENDED) == {"sigmoid", "hinge", "ipo"}
    assert set(SMOOTHED) == {"cdpo", "robust"} and "unheard of" not in SMOOTHED
    with pytest.raises(ValueError, match="loss 'made_up' needs policy.rejected_lengths, got None"):
        policy = SequenceLogps(chosen=-torch.ones(2), rejected=-torch.ones(2), chosen_lengths=torch.ones(2))
        preference_loss(policy, loss_type="made_up")


def test_a_branch_that_is_missing_is_named() -> None:
    policy, _ = tokens(("chosen", "rejected", "corrupted", "other"), torch.float32)
    with pytest.raises(
        ValueError, match="'two_pictures' needs log-probabilities of the branch 'other_rejected', policy.branches are"
    ):
        preference_loss(policy, loss_type="two_pictures")
    ones = -torch.ones(2)
    sums = SequenceLogps(chosen=ones, rejected=ones, corrupted=ones)
    with pytest.raises(ValueError, match="branch 'other', which SequenceLogps has no name for; pass TokenLogps"):
        preference_loss(sums, loss_type="two_pictures")
    with pytest.raises(TypeError, match="reference must be TokenLogps, as SequenceLogps has no log-probabilities of other"):
        preference_loss(tokens(FIVE, torch.float32, records=2)[0], sums, loss_type="two_pictures")


@pytest.mark.parametrize(
    "terms, message",
    [
        ([], "must have one term or more"),
        ([Term("sigmoid", ())], "one or more values among"),
        ([Term("log", (Value("ratio", "chosen"),))], "must have a link among .* got 'log'"),
        ([Term("square", (Value("reward", "chosen"),))], r"values among ratio, .* got 'square' of \['reward'\]"),
        ([Term("square", (Value("batch_logp", "chosen"), Value("ratio", "chosen")))], "Make it a term of its own"),
        ([Term("square", (Value("ratio", "chosen"),), offset=math.nan)], "numbers of a term of loss .* must be finite"),
    ],
)
def test_rows_that_no_backend_could_evaluate(monkeypatch: pytest.MonkeyPatch, terms: list[Term], message: str) -> None:
    monkeypatch.setitem(LOSSES, "wrong", lambda x: terms)
    with pytest.raises(ValueError, match=message):
        preference_loss(SequenceLogps(chosen=-torch.ones(2), rejected=-torch.ones(2)), loss_type="wrong")


def test_links_and_values_have_one_order() -> None:
    from mmdpo_kernels.backends.reference import preference_loss as reference
    from mmdpo_kernels.backends.triton import preference_loss_device as links
    from mmdpo_kernels.backends.triton import preference_loss_kernels as kernels

    assert set(reference.LINKS) == set(LINKS) and set(reference.VALUES) == set(VALUES)
    assert [getattr(links, name.upper()).value for name in LINKS] == list(range(len(LINKS)))
    assert [getattr(kernels, name.upper()).value for name in VALUES] == list(range(len(VALUES)))
    native = load_native()
    assert isinstance(native, str) or (native.loss_links == list(LINKS) and native.loss_values == list(VALUES))


def test_the_trainer_trains_it_and_logs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step policy and reference are one model: w = l = 0."""
    row = (Term("sigmoid", (Value("ratio", "chosen"),), offset=0.4),)
    monkeypatch.setitem(LOSSES, "trained", lambda x: row)
    loaded = tiny(tmp_path / "model")
    settings = config(tmp_path / "run", loss_type=["trained"], learning_rate=0.0)
    records = preference_records(4)
    trainer = PreferenceTrainer(loaded.model, settings, processing_class=loaded.processor, train_dataset=records)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["loss"] == pytest.approx(1 / (1 + math.exp(-0.4)), rel=1e-6)
    assert entry["rewards/chosen"] == pytest.approx(0.0, abs=1e-12)


def test_the_trainer_refuses_branches_that_its_records_lack(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="'two_pictures' looks at the branches other, other_rejected; training records have chosen"
    ):
        PreferenceConfig(str(tmp_path), loss_type=["two_pictures"])
