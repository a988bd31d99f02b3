"""`SharedRows`: rows with several targets, scored once, against scoring each pair on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmdpo_kernels import SharedRows, linear_logprobs

ROWS = torch.tensor([4, 5, 6, 4, 5, 9, 4, 4])
TARGETS = torch.tensor([1, 2, 3, 7, 2, 0, 1, 36])


def test_each_row_once() -> None:
    shared = SharedRows.from_pairs(ROWS, TARGETS)
    assert shared.rows.tolist() == [4, 5, 6, 9] and shared.targets.tolist() == [1, 2, 3, 0]
    assert len(shared.further_rows) == 4
    every, targets = shared.pairs
    assert torch.equal(shared.rows[every], ROWS) and torch.equal(targets, TARGETS)


def test_no_pairs() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    shared = SharedRows.from_pairs(empty, empty)
    assert shared.rows.shape == shared.order.shape == (0,)
    assert shared.spread(torch.zeros(0), torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0,)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 1.5, "temperature": 0.7}])
@pytest.mark.parametrize("with_bias", [False, True])
def test_as_if_each_pair_had_a_row(options: dict[str, Any], with_bias: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(12, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(37, 16, dtype=torch.float64)
    settings = {**options, "bias": torch.randn(37, dtype=torch.float64) if with_bias else None}
    shared = SharedRows.from_pairs(ROWS, TARGETS)
    rows = hidden[shared.rows]
    first = linear_logprobs(rows, weight, shared.targets, **settings).logps
    found = shared.spread(first, rows, weight, **settings)
    expected = linear_logprobs(hidden[ROWS], weight, TARGETS, **settings).logps
    torch.testing.assert_close(found, expected)
    up = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(found, hidden, up), torch.autograd.grad(expected, hidden, up))


@pytest.mark.parametrize("backend", ["chunked", "reference", "native"])
@pytest.mark.parametrize("height", [1.0, 30.0])
def test_half_precision_is_as_accurate_as_a_row_of_its_own(backend: str, height: float) -> None:
    """Also where the further target is the likeliest token and logits are large, so that their rounding is."""
    torch.manual_seed(0)
    weight = (torch.randn(37, 64) / 8).bfloat16()
    hidden = (torch.randn(12, 64) + height * weight[[0, 0, 0, 0, 7, 2, 3, 0, 0, 0, 0, 0]].float()).bfloat16()
    shared = SharedRows.from_pairs(ROWS, TARGETS)
    rows = hidden[shared.rows]
    found = shared.spread(linear_logprobs(rows, weight, shared.targets, backend=backend).logps, rows, weight, backend=backend)
    alone = linear_logprobs(hidden[ROWS], weight, TARGETS, backend=backend).logps
    truth = linear_logprobs(hidden[ROWS].double(), weight.double(), TARGETS).logps
    assert found.dtype == torch.float32 and found.max() <= 1e-5
    errors, as_alone = (found - truth).abs(), (alone - truth).abs()
    assert errors.max() <= 2 * as_alone.max() + 1e-5
    assert errors[3] <= 2 * as_alone[3] + 1e-4  # target 7 of row 4, which has it likely at the second height
